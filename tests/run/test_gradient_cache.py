"""--micro_batch: which noise dropout draws. That the gradients are those of the whole batch is in test_distributed.py.

B queries of a part.
"""

import tiny
import torch

from narvid.distributed import World


def noise_of_a_step(argv, seed):
    """One step over the same batch twice -> what dropout keeps, (calls, B, K, D) of each encoding in its order."""
    step = tiny.first_step(argv)
    kept, dropout = [], step.model.heads.co_attention.frames.dropout

    def record(module, inputs, output):
        kept.append(output[:, :1] != 0)

    dropout.register_forward_hook(record)
    torch.manual_seed(seed)  # as the trainer does before every step, from its number and the rank
    tiny.take_step(step._replace(batches=[step.batches[0]] * 2), step.model, World(0, 1, torch.device("cpu")))
    return [torch.stack(pair) for pair in zip(kept[::2], kept[1::2])]  # the stream calls its dropout twice


def test_every_part_has_noise_of_its_own_and_the_same_in_both_passes(corpus, tmp_path):
    argv = tiny.flags(corpus, tmp_path, "--dropout", 0.5, "--gradient_accumulation_steps", 2, "--micro_batch", 3)
    noise = noise_of_a_step(argv, seed=1)
    half = len(noise) // 2  # encodings of one accumulation part
    parts = half // 2
    assert parts > 1 and len(noise) == 4 * parts
    for start in (0, half):
        first, second = noise[start:start + parts], noise[start + parts:start + half]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = min(len(x[0]) for x in noise)
    other_rank = noise_of_a_step(argv, seed=2)[:parts]
    distinct = [x[:, :rows] for x in [*noise[:parts], *noise[half:half + parts], *other_rank]]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


def test_a_step_can_be_taken_again(corpus, tmp_path):
    """After a resume the same seed gives the same noise."""
    argv = tiny.flags(corpus, tmp_path, "--dropout", 0.5, "--micro_batch", 3)
    for a, b in zip(*(noise_of_a_step(argv, seed=3) for _ in range(2)), strict=True):
        assert torch.equal(a, b)
