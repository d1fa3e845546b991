"""Stochastic depth: whose branches are left out, by straight-line code; packed as padded; off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlpfast.layers.block import Block, CrossKeys, Layout
from vlpfast.layers.drop_path import path_rates, path_scale
from vlpfast.layers.experts import ExpertBlock, PairLayout
from vlpfast.models import VLPModel, preset_config
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.recipes import get

RATE, DIM, LENS = 0.5, 16, [3, 1, 5, 2, 7, 1, 4, 2]
OPTIONS = {"mlp_ratio": 2.0, "norm_eps": 1e-6, "activation": "gelu"}


def block(norm: str = "pre", drop_path: float = RATE, **more) -> Block:
    torch.manual_seed(0)
    made = Block(DIM, 2, norm=norm, drop_path=drop_path, **OPTIONS, **more)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.double().train()


def packed(lens: list[int] = LENS) -> Ragged:
    torch.manual_seed(1)
    return Ragged.from_padded(torch.randn(len(lens), max(lens), DIM).double(), torch.tensor(lens))


def layout_of(part: Ragged) -> Layout:
    return Layout(part.cu_seqlens, part.max_len)


def total(state: tuple[Tensor | None, Tensor]) -> Tensor:
    return state[1] if state[0] is None else state[0] + state[1]


def test_rates_rise_linearly():
    assert path_rates(0.2, 5) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert path_rates(0.3, 1) == [0.0]
    # BEiT v2's head goes on from the early layers: blocks 9 and 10 of 12.
    assert path_rates(0.1, 2, first=9, of=12) == pytest.approx([0.9 / 11, 1.0 / 11])


def test_models_have_their_rates():
    config = preset_config("beit2", "base")
    config = replace(config, vision=replace(config.vision, drop_path_rate=0.1))
    with torch.device("meta"):
        tower = VLPModel(config).vision
    assert [b.drop_path for b in tower.blocks] == pytest.approx([0.1 * n / 11 for n in range(12)])
    assert [b.drop_path for b in tower.head_blocks] == pytest.approx([0.9 / 11, 1.0 / 11])
    with torch.device("meta"):
        stack = VLPModel(get("vlmo_base").model).fusion
    assert [b.drop_path for b in stack.blocks] == pytest.approx([0.1 * n / 11 for n in range(12)])
    rates = {n: get(n).model.fusion.drop_path_rate for n in ("beit3_base", "beit3_base_retrieval")}
    assert rates == {"beit3_base": 0.1, "beit3_base_retrieval": 0.2}


def test_share_and_scale():
    """Of 20,000 samples the share left out lies within 5 sigma of the rate; the mean is one."""
    count, rate = 20_000, 0.3
    scale = path_scale(None, torch.zeros(count, 1, 1).double(), rate, 5)
    assert scale.shape == (count, 1, 1)
    assert set(scale.unique().tolist()) == {0.0, 1 / (1 - rate)}
    dropped = (scale == 0).double().mean()
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    again, other = (path_scale(None, torch.zeros(count, 1, 1).double(), rate, s) for s in (5, 6))
    assert again.equal(scale)
    assert not other.equal(scale)


@pytest.mark.parametrize("norm", ["pre", "post", "sub"])
def test_packed_equals_padded(norm):
    """And draws are of samples, whatever their lengths."""
    one = packed([4] * 8)
    dense = one.values.unflatten(0, (8, 4))
    run = block(norm)
    ours = total(run(None, one.values, layout_of(one), seed=3))
    theirs = total(run(None, dense, Layout(), seed=3))
    torch.testing.assert_close(ours, theirs.flatten(0, 1))
    assert not ours.allclose(total(run(None, dense, Layout(), seed=4)).flatten(0, 1))
    same = [
        path_scale(packed(lens).cu_seqlens, packed(lens).values, RATE, 9)
        for lens in (LENS, [1] * 8)
    ]
    assert same[0][packed().first()].equal(same[1])


def test_branches_of_kept_samples_alone():
    part, run = packed(), block()
    out = total(run(None, part.values, layout_of(part), seed=3))
    scales = [
        path_scale(part.cu_seqlens, part.values, RATE, fold_seed(3, site, 0)) for site in (3, 4)
    ]
    x = part.values
    x = x + scales[0] * run.attention(run.norm1(x)[0], layout_of(part))
    x = x + scales[1] * run.mlp(run.norm2(x)[0])
    torch.testing.assert_close(out, x)
    patterns = {tuple(row) for row in torch.cat([s[part.first()] for s in scales], 1).tolist()}
    assert len(patterns) > 2
    # A sample without both branches stays as it is, and so does its gradient.
    bare = packed()
    bare.values.requires_grad_(True)
    total(run(None, bare.values, layout_of(bare), seed=3)).sum().backward()
    skipped = (scales[0] + scales[1] == 0).flatten()
    assert 0 < int(skipped.sum()) < len(skipped)
    assert out[skipped].equal(part.values[skipped])
    assert bare.values.grad[skipped].equal(torch.ones_like(bare.values)[skipped])


@pytest.mark.parametrize("case", ["eval", "zero"])
def test_identity_where_off(case):
    part, plain = packed(), block(drop_path=0.0)
    run = block().eval() if case == "eval" else block(drop_path=0.0)
    expected = plain(None, part.values, layout_of(part), seed=3)
    for ours, theirs in zip(run(None, part.values, layout_of(part), seed=3), expected, strict=True):
        assert ours.equal(theirs)


def test_cross_attention_is_a_branch_too():
    part, run = packed([2] * 6), block(cross=True)
    kv = torch.randn(2, 6, 5, 2, DIM // 2).double()
    keys = CrossKeys(kv[0], kv[1], torch.arange(6))
    out = total(run(None, part.values, layout_of(part), keys, seed=3))
    x = part.values
    sites = [path_scale(part.cu_seqlens, x, RATE, fold_seed(3, site, 0)) for site in (3, 4, 5)]
    x = x + sites[0] * run.attention(run.norm1(x)[0], layout_of(part))
    x = x + sites[1] * run.cross(run.norm_cross(x)[0], layout_of(part), keys)
    x = x + sites[2] * run.mlp(run.norm2(x)[0])
    torch.testing.assert_close(out, x)


def expert_parts(kind: str, joint: bool) -> tuple[ExpertBlock, PairLayout, dict, list[Tensor]]:
    """Block, layout, streams, and of each modality the number of every token's sequence."""
    torch.manual_seed(0)
    run = ExpertBlock(
        DIM, 2, experts=kind, norm="pre", joint=joint, drop_path=RATE, **OPTIONS
    ).double()
    with torch.no_grad():
        for parameter in run.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    text, image = packed(), packed([2, 4, 1, 3, 2, 5, 1, 2])
    layout = PairLayout.of(text, image, image_first=True)
    return (
        run.train(),
        layout,
        {"text": text.values, "image": image.values},
        [part.row_ids() for part in (text, image)],
    )


@pytest.mark.parametrize(
    ("kind", "joint", "apart"),
    [("mome", False, True), ("mome", True, False), ("multiway", False, False)],
)
def test_experts_share_a_samples_draw(kind, joint, apart):
    """The attention's branch is one of both modalities; VLMo's two MLPs are two branches."""
    run, layout, streams, rows = expert_parts(kind, joint)
    branch, residual = run(None, streams, layout, seed=3)
    attended = {m: residual[m] - x for m, x in streams.items()}
    for parts, separate in ((attended, False), (branch, apart)):
        kept = [
            torch.zeros(8, dtype=torch.int64).index_add(0, ids, (parts[m] != 0).any(1).long()) > 0
            for m, ids in zip(("text", "image"), rows, strict=True)
        ]
        assert 0 < int(kept[0].sum()) < 8
        assert kept[0].equal(kept[1]) != separate
    run.eval()
    plain, _ = run(None, streams, layout, seed=3)
    assert all((x != 0).any(1).all() for x in plain.values())


def test_a_modality_alone_has_a_draw_for_each_row():
    run, _, streams, rows = expert_parts("mome", False)
    text = packed()
    layout = PairLayout.of(text, Ragged.empty(text.values), image_first=True)
    branch, residual = run(None, {"text": streams["text"]}, layout, seed=3)
    for part in (branch["text"], residual["text"] - streams["text"]):
        kept = (part != 0).any(1)
        assert 0 < int(kept.sum()) < len(kept)
        for row in range(8):
            assert len(set(kept[rows[0] == row].tolist())) == 1


@pytest.mark.parametrize(
    ("preset", "stack", "kind"), [("lxmert", "fusion", "co"), ("vse++", "text", "gru")]
)
def test_what_cannot_says_so(preset, stack, kind):
    config = preset_config(preset)
    with pytest.raises(ValueError, match=f"{stack}.drop_path_rate must be 0 .*'{kind}'"):
        replace(config, **{stack: replace(getattr(config, stack), drop_path_rate=0.1)})
    with pytest.raises(ValueError, match=r"text.drop_path_rate must be in \[0, 1\)"):
        replace(config, text=replace(config.text, drop_path_rate=1.0))
