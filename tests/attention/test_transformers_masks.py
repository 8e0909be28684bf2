"""transformers' masks are taken by what they say, whatever their strides; or they are refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from vicreg_kernels.integrations.transformers import attention_forward

B, H, T, D = 3, 4, 7, 16
MODULE = torch.nn.Module()
LOWEST = torch.finfo(torch.float32).min


def heads(queries: int = T):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, T, T)
    return [torch.randn(B, H, n, D, generator=generator) for n in sizes]


def padding(rows: int = B) -> torch.Tensor:
    keep = torch.rand(rows, 1, 1, T, generator=torch.Generator().manual_seed(1)) > 0.4
    keep[..., 0] = True
    return keep


def by_head(where: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    """[B, H, 1, T], every head its own, laid out in the order `where`."""
    keep = torch.rand(B, H, 1, T, generator=torch.Generator().manual_seed(2)) > 0.4
    keep[..., 0] = True
    back = [where.index(i) for i in range(4)]
    return keep.permute(where).contiguous().permute(back)


CAUSAL = torch.ones(T, T).tril().bool()
SAID = {
    "padding": padding(),
    "one row for all samples": padding(1),
    "expanded over heads": padding().expand(B, H, 1, T),
    "expanded over all": padding().expand(B, H, T, T),
    "written out": padding().expand(B, H, T, T).contiguous(),
    "written out for the queries": padding().expand(B, 1, T, T).contiguous(),
    "nothing hidden": torch.ones(B, 1, T, T).bool(),
    "nothing hidden, expanded": torch.ones(1, 1, 1, 1).bool().expand(B, H, T, T),
    "causal": CAUSAL[None, None],
    "causal, expanded": CAUSAL.expand(B, H, T, T),
    "causal and padding": CAUSAL & padding(),
    "by head": by_head(),
    "by head, heads last": by_head((0, 2, 3, 1)),  # stride(1) == 1
    "by head, keys first": by_head((3, 1, 0, 2)),
    "by head, for all queries": by_head().expand(B, H, T, T).contiguous(),
    "by head, causal": by_head() & CAUSAL,
    "by head, alike": padding().expand(B, H, 1, T).contiguous(),
}


def additive(keep: torch.Tensor, hidden: float) -> torch.Tensor:
    zeros = torch.zeros(keep.shape)
    return zeros.masked_fill(~keep, hidden)


def plain(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kind", ["bool", "-inf", "least", "float16's least", "half"])
@pytest.mark.parametrize("name", SAID)
def test_what_a_mask_says(name, kind):
    q, k, v = heads()
    keep = SAID[name]
    hidden = {"-inf": -torch.inf, "least": LOWEST}.get(kind, -65504.0)
    given = keep if kind == "bool" else additive(keep, hidden)
    if kind == "half":
        given = given.half()
    for _ in range(2):  # read, then as it was kept
        out, weights = attention_forward(MODULE, q, k, v, given)
        torch.testing.assert_close(out, plain(q, k, v, keep))
    assert weights is None


def test_strides_of_one_and_zero_say_nothing():
    """[B, H, 1, 1], one key: contiguous, its stride(1) is 1."""
    q, k, v = (z[:, :, :1] for z in heads())
    keep = torch.ones(B, H, 1, 1).bool()
    keep[:, 1:] = False
    out, _ = attention_forward(MODULE, q, k, v, keep)
    assert out[:, 0, 1:].eq(0).all()
    torch.testing.assert_close(out[:, 0, 0], v[:, 0, 0])


def test_a_mask_changed_in_place_is_read_again():
    q, k, v = heads()
    keep = padding()
    attention_forward(MODULE, q, k, v, keep)
    keep.copy_(keep.flip(0))
    torch.testing.assert_close(attention_forward(MODULE, q, k, v, keep)[0], plain(q, k, v, keep))
    with torch.inference_mode():
        keep = keep.clone()
        for _ in range(2):
            keep.copy_(keep.flip(-1)).select(-1, 0).fill_(True)
            out = attention_forward(MODULE, q, k, v, keep)[0]
            torch.testing.assert_close(out, plain(q, k, v, keep))


def test_is_causal_counts_where_there_is_no_mask():
    q, k, v = heads()
    causal = plain(q, k, v, CAUSAL)
    for settings in ({"is_causal": True}, {}):  # as sdpa, for a module that does not say
        torch.testing.assert_close(attention_forward(MODULE, q, k, v, **settings)[0], causal)
    keep = padding()
    out = attention_forward(MODULE, q, k, v, keep, is_causal=True)[0]
    torch.testing.assert_close(out, plain(q, k, v, keep))
    out = attention_forward(MODULE, q[:, :, -1:], k, v, is_causal=True)[0]
    torch.testing.assert_close(out, plain(q[:, :, -1:], k, v, None))
    out = attention_forward(MODULE, q[:, :, :3], k, v, is_causal=True)[0]
    torch.testing.assert_close(out, plain(q[:, :, :3], k, v, CAUSAL[:3]))


WINDOW = CAUSAL & ~CAUSAL.tril(-3)
BIAS = torch.zeros(B, 1, 1, T).index_fill(3, torch.tensor([2]), -1.0)
REFUSED = {
    "a finite bias": (BIAS, "finite bias"),
    "a large finite bias": (BIAS * 1e4, "finite bias"),
    "a positive bias": (-BIAS, "finite bias"),
    "NaN": (BIAS * torch.nan, "finite bias"),
    "a window": (WINDOW[None, None], "query to query"),
    "an additive window": (additive(WINDOW[None, None], -torch.inf), "query to query"),
    "anti-causal": (CAUSAL.mT[None, None], "query to query"),
    "one sample of its own": (
        torch.cat((CAUSAL.expand(2, 1, T, T), WINDOW.expand(1, 1, T, T))),
        "query to query",
    ),
    "two dimensions": (padding()[:, 0, 0], "got shape"),
    "too few keys": (padding()[..., :3], "got shape"),
    "other heads": (padding().expand(B, 2, 1, T), "got shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_says_is_refused(name):
    mask, message = REFUSED[name]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"attention_mask: .*{message}"):
            attention_forward(MODULE, *heads(), mask)


def test_causal_from_the_last_key_is_refused():
    """A cache of four keys before three queries: not FrameCausal's order, which begins alike."""
    late = torch.ones(3, T).tril(T - 3).bool()[None, None]
    with pytest.raises(ValueError, match="query to query"):
        attention_forward(MODULE, *heads(3), late)


@pytest.mark.parametrize("name", ["position_bias", "softcap", "s_aux", "output_attentions"])
def test_what_is_not_computed_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        attention_forward(MODULE, *heads(), padding(), **{name: 2.0})
    attention_forward(MODULE, *heads(), padding(), **{name: None})


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"dropout: got 0\.1, takes 0"):
        attention_forward(MODULE, *heads(), None, dropout=0.1)
    with pytest.raises(TypeError, match=r"attention_mask: got dtype torch\.int64"):
        attention_forward(MODULE, *heads(), padding().long())


def test_inside_torch_compile_shapes_say_it():
    """Where values have to be looked at, a whole graph is refused; one with a break is right."""
    run = torch.compile(
        lambda *x: attention_forward(MODULE, *x)[0], backend="eager", fullgraph=True
    )
    q, k, v = heads()
    for keep in (padding(), by_head()):
        torch.testing.assert_close(run(q, k, v, keep), plain(q, k, v, keep))
    with pytest.raises(Exception, match=r"attention_mask: got .* inside torch\.compile"):
        run(q, k, v, CAUSAL[None, None])
    torch.compiler.reset()
    run = torch.compile(lambda *x: attention_forward(MODULE, *x)[0], backend="eager")
    mask = additive(padding(), -torch.inf)
    torch.testing.assert_close(run(q, k, v, mask), plain(q, k, v, mask))
