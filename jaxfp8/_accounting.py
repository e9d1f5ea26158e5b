"""Which loaded leaf goes into which parameter, by path; every leaf is accounted for.

All that is wrong with the shapes of two trees is listed in one error, before any value is read.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from flax.core.meta import AxisMetadata

from jaxfp8._convert import Conversion
from jaxfp8._leaf import check_target, is_abstract
from jaxfp8._shards import plan
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.shards import KernelShards


Path: TypeAlias = tuple[str, ...]
# Of an element of a stack, in the leading axes of a parameter.
Index: TypeAlias = tuple[int, ...]

_WITH_INDEX = re.compile(r"(.*?)((?:\[\d+\])+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: a whole PaddedKernel, a loaded weight or a plain array.

    Attributes:
        node: it, without boxes.
        slots: where its arrays lie in the flattened tree.
        learns: False in an NNX Variable that is not an nnx.Param.
    """

    node: Any
    slots: slice
    learns: bool = True


# No dataclass: made of 225 layers it takes 0.3 ms less.
class Write(NamedTuple):
    """One parameter that gets new content.

    Attributes:
        name: its path, for messages.
        targets: the arrays of the parameter in `params`.
        slots: where these lie in the flattened `params`.
        conversion: how the content is made.
        sources: the loaded arrays that it is made from.
    """

    name: str
    targets: tuple[Any, ...]
    slots: slice
    conversion: Conversion
    sources: tuple[Any, ...]


def is_variable(node: object, kind: str = "Variable") -> bool:
    """Whether a node is an NNX Variable (of a kind) that is a node of a pytree.

    By the type's bases: to `isinstance` a HijaxVariable is one too, but to JAX it is a leaf.
    """
    # Importing flax.nnx takes 0.2 s more, and who has not imported it has no Variables.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and issubclass(type(node), getattr(nnx, kind, ()))


def is_parameter(node: object) -> bool:
    """Whether a node of a tree is one parameter rather than a container of several."""
    weights = PaddedKernel | DenseWeight | FP8Weight | KernelShards
    return isinstance(node, weights | AxisMetadata) or is_variable(node)


def one_level(node: Any) -> tuple[list[Any], Any]:
    """What a node of a tree holds directly, and the structure to put it back into."""

    def is_below(child: Any) -> bool:
        return child is not node

    return jax.tree.flatten(node, is_leaf=is_below)


def mapping_like(node: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """These items in a mapping of the type of `node`: dict, FrozenDict, nnx.State, OrderedDict."""
    if isinstance(node, collections.defaultdict):
        return type(node)(node.default_factory, items)
    return type(node)(items)  # type: ignore[call-arg]


def unbox(node: Any) -> Any:
    """A parameter without its boxes: `nn.Partitioned`, other AxisMetadata, an NNX Variable.

    By structure, because `Partitioned.unbox()` applies a sharding constraint under a mesh.
    """
    while isinstance(node, AxisMetadata) or is_variable(node):
        inside, _ = one_level(node)
        if len(inside) != 1:
            return node
        node = inside[0]
    if isinstance(node, KernelShards):
        return KernelShards({k: unbox(v) for k, v in node.shards.items()}, node.sizes)
    if isinstance(node, PaddedKernel | DenseWeight | FP8Weight):
        fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        return type(node)(**{name: unbox(value) for name, value in fields.items()})
    return node


def entries(tree: Any) -> dict[Path, Entry]:
    """The parameters of a tree by path, without the `value` of NNX Variables."""
    return dict(_walk(tree, (), 0, True))


# No closure that calls itself: that would be a cycle, and hold both trees' arrays until Python's
# collector comes by, which a loop of few Python objects may put off for long.
def _walk(tree: Any, above: Path, start: int, learns: bool) -> Iterator[tuple[Path, Entry]]:
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_parameter)[0]:
        stop = start + len(jax.tree.leaves(node))
        path = (*above, *(jax.tree_util.keystr((key,), simple=True) for key in keys))
        content = unbox(node)
        trains = learns and (is_variable(node, "Param") or not is_variable(node))
        if is_variable(node) and not _is_one(content):
            yield from _walk(content, path, start, trains)  # A Variable of several arrays.
        else:
            yield path, Entry(content, slice(start, stop), trains)
        start = stop


def _is_one(content: Any) -> bool:
    structure: Any = jax.tree.structure(content)
    return is_parameter(content) or structure.num_nodes == structure.num_leaves == 1


def path_name(path: Path) -> str:
    """`("Dense_0", "kernel")` as `Dense_0/kernel`."""
    return "/".join(path) or "(the tree itself)"


def split_path(path: str) -> tuple[str, Index]:
    """`"layers/kernel[3]"` as the path of the stack and the index into it, which may be empty."""
    found = _WITH_INDEX.fullmatch(path)
    if found is None:
        return path, ()
    return found[1], tuple(int(i) for i in re.findall(r"\d+", found[2]))


def shown_index(index: Index) -> str:
    """An index as `split_path` reads it."""
    return "".join(f"[{i}]" for i in index)


def is_calibration(path: Path, tree: dict[Path, Entry]) -> bool:
    """Whether a parameter is the static activation scale of a padded layer."""
    kernel = tree.get((*path[:-1], "kernel"))
    return (
        path[-1:] == ("x_scale",) and kernel is not None and isinstance(kernel.node, PaddedKernel)
    )


def account(params: Any, loaded: Any, *, partial: bool, ignore: str | Sequence[str]) -> list[Write]:
    """Pair the two trees, or list all that does not fit.

    Raises:
        TypeError: if all that is wrong are types and dtypes.
        ValueError: if paths are missing or unexpected, or a shape or layout does not fit.
    """
    targets, sources = entries(params), entries(loaded)
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    missing: list[Path] = []
    valueless: list[Path] = []
    uncalibrated: list[Path] = []
    refused: list[tuple[Path, Exception]] = []
    writes: list[Write] = []
    for path, target in targets.items():
        arrays = tuple(jax.tree.leaves(target.node))
        try:
            check_target(target.node)
            if (source := sources.get(path)) is not None:
                conversion, read = plan(
                    target.node, source.node, is_scale=is_calibration(path, targets)
                )
                writes.append(Write(path_name(path), arrays, target.slots, conversion, read))
                continue
        except (TypeError, ValueError) as error:
            refused.append((path, error.with_traceback(None)))  # It holds this frame.
            continue
        kernel = (*path[:-1], "kernel")
        if not (partial or is_calibration(path, targets)):
            missing.append(path)
        elif not partial and is_quantized(getattr(sources.get(kernel), "node", None)):
            uncalibrated.append(path)
        elif any(map(is_abstract, arrays)):
            valueless.append(path)
    unexpected = [p for p in sources if p not in targets and not ignored(p, patterns)]
    if missing or valueless or uncalibrated or unexpected or refused:
        raise _mismatch(missing, valueless, uncalibrated, unexpected, refused)
    return writes


def is_quantized(loaded: object) -> bool:
    """Whether a loaded weight is of an FP8 checkpoint: its x_scale is beside it, or it has none."""
    parts = loaded.shards.values() if isinstance(loaded, KernelShards) else (loaded,)
    return any(isinstance(part, FP8Weight) for part in parts)


def ignored(path: Path, patterns: Iterable[str]) -> bool:
    """Whether a path, or a subtree that it is in, is named by one of the patterns."""
    heads = [path_name(path[: end + 1]) for end in range(max(len(path), 1))]
    return any(fnmatch.fnmatchcase(head, pattern) for pattern in patterns for head in heads)


def _mismatch(
    missing: list[Path],
    valueless: list[Path],
    uncalibrated: list[Path],
    unexpected: list[Path],
    refused: list[tuple[Path, Exception]],
) -> Exception:
    def listed(paths: list[Path]) -> str:
        return ", ".join(map(path_name, paths))

    lines = ["`loaded` does not fit `params`, and nothing has been changed."]
    if missing:
        lines.append(
            f"Missing in `loaded` ({len(missing)}): {listed(missing)}. Add them, or pass "
            "partial=True to keep their present values."
        )
    if valueless:
        lines.append(
            f"Missing in `loaded` and abstract in `params`, so without any value "
            f"({len(valueless)}): {listed(valueless)}. Add them to `loaded`, or start from the "
            "arrays of `init` instead of `jax.eval_shape`."
        )
    if uncalibrated:
        lines.append(
            f"Static scales of inputs that a quantized weight in `loaded` does not bring "
            f"({len(uncalibrated)}): {listed(uncalibrated)}. Give the layers "
            "static_x_scale=False, as their checkpoint has dynamic activations, or get scales "
            "from `calibrate`; with partial=True the present ones are kept."
        )
    if unexpected:
        lines.append(
            f"Unexpected in `loaded` ({len(unexpected)}): {listed(unexpected)}. Remove them, or "
            "name them in `ignore`, for example "
            f"ignore=({'/'.join((*unexpected[0][:-1], '*'))!r},)."
        )
    lines.extend(_nesting_hint(missing, unexpected))
    if refused:
        lines.append(f"Mismatched ({len(refused)}):")
        lines.extend(f"  {path_name(path)}: {error}" for path, error in refused)
    only_types = not (missing or valueless or uncalibrated or unexpected) and all(
        isinstance(error, TypeError) for _, error in refused
    )
    return (TypeError if only_types else ValueError)("\n".join(lines))


def _nesting_hint(missing: list[Path], unexpected: list[Path]) -> list[str]:
    # The usual slip: a whole variables dict on one side and its "params" on the other.
    if {path[1:] for path in unexpected} & set(missing):
        return [f"Did you mean to pass loaded[{unexpected[0][0]!r}]?"]
    if {path[1:] for path in missing} & set(unexpected):
        return [f"Did you mean to pass {{{missing[0][0]!r}: loaded}}?"]
    # A State as nested dicts: what Orbax gives back where it was not told the types.
    if {path[:-1] for path in unexpected if path[-1:] == ("value",)} & set(missing):
        return [
            "Its paths end in 'value', as those of an nnx.State that was restored into plain dicts "
            "do. Restore it into `nnx.state(nnx.eval_shape(make_model))` of the model saved."
        ]
    return []
