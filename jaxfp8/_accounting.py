"""Which loaded leaf goes into which parameter, by path; every leaf is accounted for.

All that is wrong with the shapes of two trees is listed in one error, before any value is read.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
from flax.core.meta import AxisMetadata

from jaxfp8._convert import Conversion
from jaxfp8._leaf import check_target, is_abstract
from jaxfp8._shards import plan
from jaxfp8.padded import DenseWeight, FP8Weight, PaddedKernel
from jaxfp8.shards import KernelShards


Path: TypeAlias = tuple[str, ...]


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


@dataclasses.dataclass(frozen=True)
class Write:
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
    found: dict[Path, Entry] = {}

    def walk(tree: Any, above: Path, start: int, learns: bool) -> None:
        for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_parameter)[0]:
            stop = start + len(jax.tree.leaves(node))
            path = (*above, *(jax.tree_util.keystr((key,), simple=True) for key in keys))
            content = unbox(node)
            trains = learns and (is_variable(node, "Param") or not is_variable(node))
            if is_variable(node) and not _is_one(content):
                walk(content, path, start, trains)  # A Variable of several arrays.
            else:
                found[path] = Entry(content, slice(start, stop), trains)
            start = stop

    walk(tree, (), 0, True)
    return found


def _is_one(content: Any) -> bool:
    structure: Any = jax.tree.structure(content)
    return is_parameter(content) or structure.num_nodes == structure.num_leaves == 1


def path_name(path: Path) -> str:
    """`("Dense_0", "kernel")` as `Dense_0/kernel`."""
    return "/".join(path) or "(the tree itself)"


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
            refused.append((path, error))
            continue
        if not (partial or is_calibration(path, targets)):
            missing.append(path)
        elif any(map(is_abstract, arrays)):
            valueless.append(path)
    unexpected = [p for p in sources if p not in targets and not ignored(p, patterns)]
    if missing or valueless or unexpected or refused:
        raise _mismatch(missing, valueless, unexpected, refused)
    return writes


def ignored(path: Path, patterns: Iterable[str]) -> bool:
    """Whether a path, or a subtree that it is in, is named by one of the patterns."""
    heads = [path_name(path[: end + 1]) for end in range(max(len(path), 1))]
    return any(fnmatch.fnmatchcase(head, pattern) for pattern in patterns for head in heads)


def _mismatch(
    missing: list[Path],
    valueless: list[Path],
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
    only_types = not (missing or valueless or unexpected) and all(
        isinstance(error, TypeError) for _, error in refused
    )
    return (TypeError if only_types else ValueError)("\n".join(lines))


def _nesting_hint(missing: list[Path], unexpected: list[Path]) -> list[str]:
    # The usual slip: a whole variables dict on one side and its "params" on the other.
    if {path[1:] for path in unexpected} & set(missing):
        return [f"Did you mean to pass loaded[{unexpected[0][0]!r}]?"]
    if {path[1:] for path in missing} & set(unexpected):
        return [f"Did you mean to pass {{{missing[0][0]!r}: loaded}}?"]
    return []
