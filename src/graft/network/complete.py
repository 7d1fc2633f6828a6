"""Whether what variants built has all that the rest relies on: the first thing that a part of one's own is told."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from graft.config.families import PartConfig
from graft.config.roles import ROLES
from graft.errors import ConfigError
from graft.initialization import Initializes
from graft.part import Part, PartOutput, own_roles

_MAPS = "make linear maps with site.make_linear(…, role=…) and norms with site.make_norm(…), which have it"
_START = (
    "give it init_parameters(rng), which fills them: models are built without memory, so what __init__ writes into "
    f"tensors is lost; {_MAPS}"
)


def check_modules(model: nn.Module) -> None:
    """Raises ConfigError for the first module that lacks something: a role, a start, a part's method."""
    for name, module in model.named_modules():
        for problem, fix in _lacking(module):
            raise ConfigError(f"{type(module).__name__} {problem}", where=name, fix=fix)


def check_part(part: object, config: PartConfig) -> None:
    """Raises ConfigError where what a part's config builds is no part."""
    if not isinstance(part, Part):
        raise ConfigError(
            f"{config.implementation} makes {type(part).__name__}, which is no graft.part.Part",
            where=f"{type(config).__module__}.{type(config).__qualname__}",
            fix="derive it from Part",
        )


def _lacking(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What a module lacks, and what to do."""
    if isinstance(module, Part):
        if not isinstance(getattr(module, "config", None), PartConfig):
            yield "has no config", "write self.config = config in its __init__"
        for method in ("forward", "flops_per_token"):
            if getattr(type(module), method) is getattr(Part, method):
                yield f"has no {method}", f"write it, see graft.part.Part.{method}"
    for parameter, role in own_roles(module):
        if role is None:
            yield f"says no role of its parameter {parameter}", f"set role or param_roles; {_MAPS}"
        elif role not in ROLES:
            yield f"gives its parameter {parameter} the role '{role}'", f"choose one of {', '.join(ROLES)}"
    owned = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if owned and not isinstance(module, Initializes):
        yield f"owns {', '.join(name for name, _ in owned)} but has no init_parameters", _START


def check_output(out: object, part: nn.Module) -> None:
    """Raises ConfigError where a part returned something else than a `PartOutput`."""
    if not isinstance(out, PartOutput):
        kind = "a tensor" if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"{type(part).__name__}.forward returned {kind}",
            where=type(part).__module__,
            expected="graft.part.PartOutput(y, state)",
        )
