"""Track: switches back are counted, and nothing is moved."""

import pytest
import torch
from tiny import llama, quantized, task

from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.track import Track


@pytest.mark.parametrize("integers, turns", [([0, 1, 0, 1, 0], [0, 0, 1, 1, 1]), ([0, 1, 2, 3, 3], [0, 0, 0, 0, 0]),
                                             ([5, 4, 4, 6, 6], [0, 0, 0, 1, 0])])
def test_a_switch_back_is_an_oscillation(integers, turns):
    codes = [torch.tensor([i], dtype=torch.uint8) for i in integers]
    track = Track(0.25)
    seen = {"codes": codes[0], "turn": torch.zeros(1, dtype=torch.int8), "often": torch.zeros(1), "mean": codes[0].float()}
    often, mean = 0.0, float(integers[0])
    for one, turned in zip(codes[1:], turns[1:], strict=True):
        track.follow(seen, one)
        often, mean = 0.75 * often + 0.25 * turned, 0.75 * mean + 0.25 * float(one)
        assert float(seen["often"]) == pytest.approx(often) and float(seen["mean"]) == pytest.approx(mean)


def test_tracking_moves_nothing_and_finds_what_turns():
    ends, track = [], Track()
    for tactics in ((), (track,)):
        model = quantized(llama())
        fit(model, task(), optimizer=AdamW(lr=3e-2), steps=6, tactics=tactics)
        ends.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))
    assert 0 == track.turning(1.0) < track.turning() < 1 and track.share(lambda seen: seen["often"] >= 0) == 1


def test_what_was_seen_is_restored():
    one, other = Track(), Track()
    fit(quantized(llama()), task(), optimizer=AdamW(lr=3e-2), steps=6, tactics=[one])
    fit(quantized(llama()), task(), optimizer=AdamW(lr=3e-2), steps=1, tactics=[other])
    assert other.turning() == 0
    other.load_state_dict(one.state_dict())
    assert other.turning() == one.turning() > 0
