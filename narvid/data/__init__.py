"""From videos and annotation files to batches. Importing this loads nothing."""
