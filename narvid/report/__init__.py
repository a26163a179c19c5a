"""What finished runs say: published tables, comparison, figures, gallery. The scripts of these names call it."""
