"""Weights from and to other libraries' models, strictly: every tensor is used or named.

What is called what in which library is in `layouts/`; neither library is needed to convert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlpfast.models.vlp import VLPModel

# In a rule, a part that theirs has not: zeros here, and left out of theirs.
ZEROS = "-"


@dataclass(frozen=True)
class Rule:
    """Our tensors and the other library's that hold the same numbers, each side joined by rows.

    Attributes:
        ours, theirs: names; "name#2/3" of ours is the last third of a tensor's rows; `ZEROS` among
            theirs where theirs has none.
        shares: of the joined rows, what each of ours has; theirs have equal parts.
        transpose: theirs is multiplied from the right.
        lead: leading dimensions of size 1 that theirs has more.
        skip: first rows of theirs that nothing reads; exported as zeros.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    transpose: bool = False
    lead: int = 0
    skip: int = 0

    def import_(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors from theirs."""
        like = source[self.theirs[0]]
        parts = [torch.zeros_like(like) if n == ZEROS else source[n] for n in self.theirs]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        for _ in range(self.lead):
            joined = joined.squeeze(0)
        joined = joined[self.skip :] if self.skip else joined
        joined = joined.T if self.transpose else joined
        if len(self.ours) == 1:
            return {self.ours[0]: joined}
        unit = joined.shape[0] // sum(self.shares)
        return dict(zip(self.ours, joined.split([unit * s for s in self.shares]), strict=True))

    def export(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors from ours."""
        parts = [_part(state, name) for name in self.ours]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        joined = joined.T if self.transpose else joined
        if self.skip:
            joined = torch.cat([joined.new_zeros(self.skip, *joined.shape[1:]), joined])
        joined = joined.reshape((1,) * self.lead + joined.shape)
        parts = joined.chunk(len(self.theirs)) if len(self.theirs) > 1 else [joined]
        return {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(self.theirs, parts, strict=True)
            if name != ZEROS
        }


@dataclass(frozen=True)
class Layout:
    """One model of another library.

    Attributes:
        name: of library and class.
        rules: one for each group of tensors.
        unused: (pattern of names, reason) of tensors that have no place here.
        lacks: our tensors that the other library has not; importing leaves them as they are.
    """

    name: str
    rules: tuple[Rule, ...]
    unused: tuple[tuple[str, str], ...] = ()
    lacks: tuple[str, ...] = ()

    def reason(self, name: str) -> str | None:
        """Why the tensor `name` is not taken, or None where nothing says so."""
        return next((why for pattern, why in self.unused if fnmatch(name, pattern)), None)


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor; `str` makes it a table.

    Attributes:
        layout: what was read.
        used: (our name, their names, shape) of every tensor that was loaded.
        unused: (their name, reason) of every tensor that was not.
    """

    layout: str
    used: tuple[tuple[str, str, tuple[int, ...]], ...]
    unused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = [("vlpfast", "shape", self.layout)]
        rows += [
            (ours, "x".join(map(str, shape)) or "1", theirs) for ours, theirs, shape in self.used
        ]
        rows += [("(not used)", "", f"{name}: {reason}") for name, reason in self.unused]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        count = f"{len(self.used)} tensors loaded, {len(self.unused)} not used"
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], count])


def convert(layout: Layout, source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """Our state dict from theirs, with the report.

    Raises:
        ValueError: `source` lacks tensors, or holds some that have no place here; all are named.
    """
    wanted = {name for rule in layout.rules for name in rule.theirs} - {ZEROS}
    missing = sorted(wanted - source.keys())
    foreign = sorted(n for n in source.keys() - wanted if layout.reason(n) is None)
    if missing or foreign:
        raise ValueError(
            f"source is not a state dict of {layout.name} of this configuration: "
            + _lists(("missing", missing), ("without a place here", foreign))
        )
    state: dict[str, Tensor] = {}
    used = []
    for rule in layout.rules:
        for name, tensor in rule.import_(source).items():
            if name in state and not torch.equal(state[name], tensor):
                raise ValueError(f"{rule.theirs} differ from what else is the one tensor {name}")
            state[name] = tensor
            used.append((name, " + ".join(rule.theirs), tuple(tensor.shape)))
    state = _whole(state)
    unused = [(name, layout.reason(name)) for name in sorted(source.keys() - wanted)]
    unused += [(name, "of ours, left as it was") for name in layout.lacks]
    return state, LoadReport(layout.name, tuple(used), tuple(unused))


def import_weights(
    model: VLPModel, source: Mapping[str, Tensor] | str | Path, library: str
) -> LoadReport:
    """Loads another library's weights into `model`, whose configuration must be the same.

    Args:
        model: of a preset that `library` has, see `layouts.LAYOUTS`.
        source: state dict, or the path of a .safetensors file.
        library: "transformers", "open_clip" or "unilm".

    Returns:
        The report; nothing is dropped without being named in it.

    Raises:
        ValueError: unknown library or preset, missing or foreign tensors, shapes that do not fit.
    """
    if isinstance(source, str | Path):
        source = load_file(source)
    state, report = convert(_layout(model, library), source)
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"weights of {report.layout} do not fit: {_lists(('shapes', wrong))}")
    # Every tensor is in it once (`_layout`), tied ones under one of their names.
    model.load_state_dict(state, strict=False)
    return report


def export_weights(
    model: VLPModel, library: str, path: str | Path | None = None
) -> dict[str, Tensor]:
    """The model's weights by another library's names, copied; the inverse of `import_weights`.

    Args:
        model: of a preset that `library` has.
        library: "transformers", "open_clip" or "unilm".
        path: a .safetensors file to write too.

    Returns:
        A state dict for that library's `load_state_dict`. Tensors that it has and this model has
        not (`Layout.unused`) are not in it.
    """
    state = model.state_dict()
    out: dict[str, Tensor] = {}
    for rule in _layout(model, library).rules:
        out |= rule.export(state)
    if path is not None:
        save_file(out, path, metadata={"format": "pt"})
    return out


def _layout(model: VLPModel, library: str) -> Layout:
    """The library's layout of the model's preset, which has a place for each of its tensors."""
    from vlpfast.integrations.layouts import LAYOUTS

    config = model.config
    if library not in LAYOUTS:
        raise ValueError(f"library must be one of {sorted(LAYOUTS)}, got {library!r}")
    if config.preset not in LAYOUTS[library]:
        raise ValueError(
            f"{library} has no model of preset {config.preset!r}; it has {sorted(LAYOUTS[library])}"
        )
    layout = LAYOUTS[library][config.preset](config)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys()
    own = model.state_dict().keys() - (tied - dict(model.named_parameters()).keys())
    placed = {name.partition("#")[0] for rule in layout.rules for name in rule.ours}
    placed |= set(layout.lacks)
    if own != placed:
        raise ValueError(
            f"{layout.name} is not built as this model: "
            + _lists(
                ("without a place there", sorted(own - placed)),
                ("missing here", sorted(placed - own)),
            )
        )
    return layout


def _part(state: Mapping[str, Tensor], name: str) -> Tensor:
    name, _, part = name.partition("#")
    if not part:
        return state[name]
    number, count = map(int, part.split("/"))
    return state[name].chunk(count)[number]


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts "name#0/2", "name#1/2" joined under their name; they stand in order."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(name.partition("#")[0], []).append(tensor)
    return {name: torch.cat(some) if len(some) > 1 else some[0] for name, some in parts.items()}


def _lists(*lists: tuple[str, list[str]], most: int = 8) -> str:
    """ "what: name, name; what: name", of at most so many names each."""
    return "; ".join(
        f"{what}: {', '.join(names[:most])}"
        + (f" and {len(names) - most} more" if len(names) > most else "")
        for what, names in lists
        if names
    )
