"""The peers' momentum updates in one pass: the same weights, up to the rounding of another order of
operations.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bench import peers


def pair():
    """A network and one that follows it; buffers differ, and stay."""
    online = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))
    target = copy.deepcopy(online)
    for z in (*online.parameters(), *online.buffers()):
        z.data = z.data + 1
    return online, target


def lightly(get):
    online, target = pair()
    for _ in range(3):
        get("update_momentum")(online, target, 0.9)
    return target, [0.9] * 3


def solo_learn(get):
    (online, target), updater = pair(), get("MomentumUpdater")(0.5, 0.9)
    momenta = []
    for step in range(3):
        updater.update(online, target)
        momenta.append(updater.cur_tau)
        updater.update_tau(step + 1, 3)
    assert updater.cur_tau == pytest.approx(0.9)
    return target, momenta


def pyjepa(get):
    online, target = pair()
    ema = get("EMA")(online, target, iter((0.2, 0.6)))
    momenta = [ema.update(), ema.update()]
    with pytest.raises(StopIteration):
        ema.update()
    momenta.append(get("EMA")(online, target, constant_momentum=0.7).update())
    assert not any(z.requires_grad for z in target.parameters())
    return target, momenta


EXPECTED = {
    "lightly": [0.9] * 3,
    "solo_learn": [0.9 - 0.2 * (1 + math.cos(math.pi * k / 3)) for k in range(3)],
    "pyjepa": [0.2, 0.6, 0.7],
}
UPDATES = {f.__name__: f for f in (lightly, solo_learn, pyjepa)}


@pytest.mark.parametrize("peer", UPDATES)
def test_momentum(peer):
    torch.manual_seed(1)
    target, momenta = UPDATES[peer](peers.ours(peer))
    assert momenta == pytest.approx(EXPECTED[peer])
    torch.manual_seed(1)
    online, plain = pair()
    for m in momenta:
        for z, source in zip(plain.parameters(), online.parameters(), strict=True):
            z.data = m * z.data + (1 - m) * source.data
    torch.testing.assert_close(target.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)
    with peers.importable(peer):
        try:
            get = peers.theirs(peer)
        except ImportError as error:
            pytest.skip(f"{peer} cannot be imported: {error}")
        torch.manual_seed(1)
        theirs, same = UPDATES[peer](get)
    assert momenta == pytest.approx(same)
    torch.testing.assert_close(target.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)
