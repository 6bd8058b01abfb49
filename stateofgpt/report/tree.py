"""The tree of models: which checkpoint came from which, read from the checkpoints themselves.

Owns reading lineages out of a folder's manifests, the tree as text (`sog runs`) and the tree as SVG (the report). Knows
nothing about what is in a checkpoint besides its manifest; a manifest that cannot be read is no node.

A model may have more than one parent (a policy comes from the SFT model and from the reward model): the first is the
one whose weights it continues, and the tree hangs it there; the others are named beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

MANIFEST = "MANIFEST.json"
STAGE_COLOURS = {"pretrain": "base", "base": "base", "sft": "sft", "reward": "reward", "rl": "rl", "improve": "rl"}
TOLD = ("val_bpb", "val_loss", "pair_accuracy", "true_rl", "true_score")  # the first of these that a model has is shown


@dataclass(frozen=True)
class Node:
    """One checkpoint: who it is and the ids of its parents. A parent that lies elsewhere is a node without a path."""

    id: str
    name: str
    stage: str
    parents: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def told(self) -> str:
        """The number that says most about this model, with its name; empty if it has none."""
        for key in TOLD:
            value = self.metrics.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return f"{key.replace('_', ' ')} {value:.3f}"
        return ""


def read_nodes(folder: Path) -> list[Node]:
    """All checkpoints under a folder and their parents, parents first, otherwise by path; a copy is told once."""
    found: dict[str, Node] = {}
    elsewhere: dict[str, Node] = {}
    for path in sorted(folder.rglob(MANIFEST)):
        inside = path.relative_to(folder).parts[:-1]
        if "resume" in inside or any(part.endswith((".incomplete", ".previous")) for part in inside):
            continue
        node, parents = _read(path)
        if node is not None:
            found.setdefault(node.id, node)
            elsewhere.update({parent.id: parent for parent in parents})
    return _parents_first({**{i: parent for i, parent in elsewhere.items() if i not in found}, **found})


def _read(path: Path) -> tuple[Node | None, list[Node]]:
    """The checkpoint a manifest describes and what it says of its parents; no node if it describes none."""
    try:
        manifest = json.loads(path.read_bytes())
        told = [Node(str(p["id"]), str(p["name"]), str(p["stage"])) for p in manifest["parents"]]
        own = (str(manifest["id"]), str(manifest["name"]), str(manifest["stage"]))
        return Node(*own, tuple(p.id for p in told), dict(manifest.get("metrics") or {}), path.parent), told
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, []


def _parents_first(nodes: Mapping[str, Node]) -> list[Node]:
    placed: dict[str, Node] = {}
    waiting = dict(nodes)
    while waiting:
        ready = [node for node in waiting.values() if not any(p in waiting and p != node.id for p in node.parents)]
        for node in ready or [next(iter(waiting.values()))]:  # no cycle can be; a crafted file must not hang us
            placed[node.id] = waiting.pop(node.id)
    return list(placed.values())


def text_tree(nodes: Sequence[Node]) -> str:
    """The tree with box-drawing characters, one line a model; empty for no models."""
    known = {node.id: node for node in nodes}
    order = {node.id: i for i, node in enumerate(nodes)}
    children: dict[str | None, list[Node]] = {}
    for node in nodes:
        first = next((p for p in node.parents if p in known and order[p] < order[node.id]), None)
        children.setdefault(first, []).append(node)

    def lines(node: Node, lead: str, branch: str) -> Iterator[str]:
        yield f"{lead}{branch}{_line(node, known)}"
        deeper = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        below = children.get(node.id, [])
        for i, child in enumerate(below):
            yield from lines(child, deeper, "└─ " if i == len(below) - 1 else "├─ ")

    return "\n".join(line for node in children.get(None, []) for line in lines(node, "", ""))


def _line(node: Node, known: Mapping[str, Node]) -> str:
    shown = [known[p].name for p in node.parents if p in known]
    also = f"with {', '.join(shown[1:])}" if len(shown) > 1 else ""
    elsewhere = "" if node.path else "(not in this folder)"
    details = [node.stage if node.stage not in node.name else "", node.id[:8], node.told, also, elsewhere]
    return "  ".join([node.name, *filter(None, details)])


def print_tree(folder: Path) -> None:
    """Print the tree of all models under a folder, or one sentence when there are none."""
    from rich.console import Console

    text = text_tree(read_nodes(folder))
    Console(soft_wrap=True).print(
        text or f"No models under {folder} yet; `sog run laptop` raises one.", markup=False, highlight=False
    )


# --- drawing -----------------------------------------------------------------------------------------------------

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 190.0, 54.0, 24.0, 40.0


def tree_svg(nodes: Sequence[Node]) -> Markup:
    """The models as boxes, children below parents: a solid line carries weights on, a dashed one only advice."""
    if not nodes:
        return Markup("")
    row = _rows(nodes)
    lane = _lanes(nodes, row)
    place = {i: (2 + lane[i] * (BOX_WIDTH + GAP_X), 2 + row[i] * (BOX_HEIGHT + GAP_Y)) for i in row}
    edges = [_edge(place[p], place[n.id], i > 0) for n in nodes for i, p in enumerate(n.parents) if p in place]
    boxes = [_box(node, *place[node.id]) for node in nodes]
    names = {node.id: node.name for node in nodes}
    about = "; ".join(
        f"{n.name} from {' and '.join(names[p] for p in n.parents if p in names) or 'scratch'}" for n in nodes
    )
    width = (max(lane.values()) + 1) * (BOX_WIDTH + GAP_X) - GAP_X + 4
    height = (max(row.values()) + 1) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 4
    svg = Markup(
        '<svg class="tree" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}" role="img" '
        'aria-label="Tree of models: {about}.">{inner}</svg>'
    )
    return svg.format(w=width, h=height, about=about, inner=Markup("").join([*edges, *boxes]))


def _rows(nodes: Sequence[Node]) -> dict[str, int]:
    """Depth of each node: one below its deepest parent, so a model stands below the reward model that advised it."""
    row: dict[str, int] = {}
    for node in nodes:  # parents first
        row[node.id] = max((row[p] + 1 for p in node.parents if p in row), default=0)
    return row


def _lanes(nodes: Sequence[Node], row: Mapping[str, int]) -> dict[str, int]:
    """A column for each node: the deepest child goes on below its first parent, the others stand aside.

    A node keeps its column free from its first parent's row down to its own, so that no line crosses a box.
    """
    children: dict[str | None, list[Node]] = {}
    for node in nodes:
        first = next((p for p in node.parents if row.get(p, row[node.id]) < row[node.id]), None)
        children.setdefault(first, []).append(node)
    lane: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    waiting: list[tuple[str | None, Node]] = [(None, node) for node in reversed(children.get(None, []))]
    while waiting:
        parent, node = waiting.pop()
        span = range(row[parent] + 1 if parent is not None else 0, row[node.id] + 1)
        column = lane[parent] if parent is not None else 0
        while any((column, r) in taken for r in span):
            column += 1
        lane[node.id] = column
        taken.update((column, r) for r in span)
        below = sorted(children.get(node.id, []), key=lambda child: row[child.id])  # the deepest is taken first
        waiting.extend((node.id, child) for child in below)
    return lane


def _edge(parent: tuple[float, float], child: tuple[float, float], advised: bool) -> Markup:
    x1, y1 = parent[0] + BOX_WIDTH / 2, parent[1] + BOX_HEIGHT
    x2, y2 = child[0] + BOX_WIDTH / 2, child[1]
    if x1 != x2 and advised:
        x2 += 24  # beside the line that carries the weights
    bend = min(28.0, (y2 - y1) * 0.6)
    path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y2 - 8:.1f} {x2:.1f} {y2 - bend - 12:.1f} {x2:.1f} {y2:.1f}"
    if not advised:
        path = f"M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y1 + 8:.1f} {x2:.1f} {y1 + GAP_Y:.1f} V{y2:.1f}"
    return Markup('<path class="{}" d="{}"/>').format("edge advised" if advised else "edge", path)


def _box(node: Node, x: float, y: float) -> Markup:
    colour = STAGE_COLOURS.get(node.stage, "1")
    name = node.name if len(node.name) <= 24 else node.name[:23] + "…"
    under = node.told or (node.id[:12] if node.path else "from another folder")
    inner = Markup(
        '<g class="c-{c}{away}"><title>{title}</title><rect class="box" x="{x:.1f}" y="{y:.1f}" width="{w:.0f}" '
        'height="{h:.0f}" rx="5"/><rect class="mark" x="{x:.1f}" y="{y:.1f}" width="4" height="{h:.0f}" rx="2"/>'
        '<text class="who" x="{tx:.1f}" y="{ty:.1f}">{name}</text>'
        '<text class="tick" x="{tx:.1f}" y="{uy:.1f}">{under}</text></g>'
    )
    return inner.format(
        c=colour, away="" if node.path else " away", x=x, y=y, w=BOX_WIDTH, h=BOX_HEIGHT, tx=x + 15, ty=y + 23,
        uy=y + 42, name=name, title=f"{node.name}, {node.stage}, {node.id}", under=under,
    )  # fmt: skip
