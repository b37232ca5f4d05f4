"""Rules: which tensors get which numbers. Data, not code: a list of `Rule`s goes to JSON and back and gives the same model.

    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=w4, input=a8)])
    quantize(model, "w2a8-g64")                                    # the same, from a bit string

A rule names modules by a glob on their names or by a role ("@head"); the first rule that matches wins, for each slot by itself: one rule may set the
weight of a layer and a later one its input. A slot set to None says full precision aloud. An address "glob:signal" reaches a signal of a module and
gives it the Quant of the slot `signal`: "*.q_proj:output" of a layer, "*.self_attn:key" inside attention (query, key, value, probabilities). And
"*.c_attn[q]" is a part of the rows of a fused matrix (fused.py).

Nothing is silent: a user's rule that matches nothing is an error with the nearest names; so are a signal that a module does not have, one parameter
under two different Quants, and, with a target, a tensor that the target cannot hold. An embedding's input is ids, which no rule quantizes. A
rule that only keeps things full speaks of all that is inside of what it names: `keep_full("model.layers.0")` is the whole block.

Layers are replaced in place by their quantized form, which shares their parameters. What was decided stays on the model as `qatlas_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from ..core.error import RuleError, nearest
from ..core.noun import Noun
from ..core.quantizer import Quant, Quantizer
from ..core.scheme import scheme
from ..core.transform import Transform
from ..layers.adapter import AdapterSpec
from ..layers.attention import SLOTS, WATCHED, attends
from ..layers.embedding import QEmbedding
from ..layers.frozen import Frozen
from ..layers.norm import Norm
from ..layers.packed import Packed
from ..layers.quantized import Quantized, Slots
from . import fused, inner, mixture
from .fitting import fitted
from .probe import peaks
from .quantized import check_tied, quantizers, reachable, replace
from .roles import Role, roles
from .signals import matches


@dataclass(frozen=True)
class Unset(Noun):
    """A slot of which a rule says nothing."""


UNSET = Unset()


@dataclass(frozen=True)
class Rule(Noun):
    """where: a glob on module names, a role, or an address "glob:signal". The slots: a value, None (full precision), or nothing said.

    optional: a rule of the library's own, which may match nothing.
    """

    where: str
    weight: Quant | Unset | None = UNSET
    input: Quant | Unset | None = UNSET
    output: Quant | Unset | None = UNSET
    transform: Transform | Unset | None = UNSET
    adapter: AdapterSpec | Unset | None = UNSET
    keep: str | Unset = UNSET
    norm: Norm | Unset | None = UNSET
    frozen: Frozen | Unset | None = UNSET
    signal: Quant | Unset | None = UNSET
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", str(self.where))
        others = [field.name for field in fields(self) if field.name not in ("where", "signal", "optional") and getattr(self, field.name) != UNSET]
        if self.signal != UNSET and ":" not in self.where:
            raise RuleError(f"Rule({self.where!r}, signal=...): a signal has an address, for instance {self.where + ':output'!r}")
        if ":" in self.where and (others or self.signal == UNSET):
            glob, said = self.where.partition(":")[0], f", {others[0]}=..." if others else ""
            raise RuleError(f"Rule({self.where!r}{said}): an address takes signal= and nothing else; other slots belong to {glob!r}")
        if self.rows and set(self.said()) - {"weight"}:
            raise RuleError(f"Rule({self.where!r}): rows of a matrix have a weight of their own and nothing else; write {self.glob!r} for the rest")

    def matches(self, name: str, role: set[Role]) -> bool:
        """Whether a module of this name and these roles is meant."""
        return matches(self.glob, name, role)

    @property
    def glob(self) -> str:
        """The names or the role that are meant, without signal and rows."""
        return fused.parse(self.where.partition(":")[0])[0]

    @property
    def rows(self) -> str:
        """The part of a fused matrix, else nothing."""
        return fused.parse(self.where)[1]

    @property
    def address(self) -> str:
        """The signal of an address, else nothing."""
        return self.where.partition(":")[2]

    def said(self) -> dict[str, Any]:
        """Slot -> value, for the slots that the rule sets; a signal's address becomes the slot of that name."""
        slots = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("where", "signal", "optional")}
        if self.signal != UNSET:
            slots[self.address] = self.signal
        return {name: value for name, value in slots.items() if value != UNSET}


def keep_full(*where: str) -> list[Rule]:
    """Rules that leave these roles or globs in full precision. A role may be absent from a model; a glob may not."""
    return [Rule(each, weight=None) if fused.parse(str(each))[1] else
            Rule(each, weight=None, input=None, output=None, transform=None, adapter=None, norm=None, frozen=None, optional=str(each)[:1] == "@")
            for each in where]


def of_scheme(text: str) -> list[Rule]:
    """The rules of a bit string: embeddings, heads, classifiers and routers full, all other layers as it says."""
    parts = scheme(text)
    kept = [] if parts.cache is None else cached(parts.cache)
    return [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER, Role.ROUTER), *kept, Rule("*", weight=parts.weight, input=parts.input)]


def cached(key: Quant, value: Quant | None = None) -> list[Rule]:
    """Rules that quantize keys and values (as the keys, unless said), in training and in the cache (serving.py)."""
    return [Rule("@attention:key", signal=key), Rule("@attention:value", signal=key if value is None else value)]


def quantize(model: nn.Module, rules: str | Sequence[Rule], task: Any = None, target: str | None = None) -> nn.Module:
    """Replace the layers of `model` in place, as the rules say, and return it.

    task: brings the target (every weight's Quant is fitted to it, or refused), extra rules (they come first), and calibration data for transforms and
    static activations. Without a task, static activations wait for `calibrate`.
    target: the target alone, where there is no task; a task's own comes first.

    Raises:
        RuleError: a rule that matches nothing, an unknown signal, a parameter under two Quants, a model that is quantized already.
        QuantError, FormatError: numbers that cannot work, or that the target cannot hold.

    >>> model = quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), "w4")
    >>> type(model[0]).__name__, type(model[1]).__name__
    ('QLinear', 'Linear')
    """
    decision = decided(model, rules, task, target)
    try:
        decision.carry_out(model)
    finally:
        decision.close()
    inner.install(model, decision.inside)
    _calibrate(model, task)
    return model


@dataclass
class Decision:
    """What `quantize` is about to do: layer -> Slots, attention module -> signal -> Quant, layer -> its inputs' peaks. All that can be refused has
    been; nothing is replaced yet but stacked experts, which stand open. `carry_out` replaces all layers, or those below one module: block by block, a
    model need never be whole in fp32. `close` ends it: experts without numbers are put back as they were."""

    layers: dict[str, Slots]
    inside: dict[str, dict[str, Quant]]
    peak: dict[str, Tensor]
    close: Callable[[], None]

    def carry_out(self, model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Replace the layers whose names are wanted."""
        replace(model, {name: slots for name, slots in self.layers.items() if wanted(name)}, self.peak)


def decided(model: nn.Module, rules: str | Sequence[Rule], task: Any = None, target: str | None = None) -> Decision:
    """What `quantize` would do with the same arguments; the rules are noted on the model, and nothing else of it is changed.

    Raises:
        RuleError, QuantError, FormatError: as `quantize`.
    """
    rules = [*getattr(task, "extra_rules", ()), *(of_scheme(rules) if isinstance(rules, str) else rules)]
    taken = [name for name, module in model.named_modules() if isinstance(module, Quantized | Packed | Quantizer)]
    if taken:
        raise RuleError(f"{taken[0]} is quantized already, and {len(taken) - 1} more modules; start from the full-precision model")
    close = mixture.open_all(model)
    try:
        plan, inside = _plan(model, rules)
        inner.whole(model, inside, model.qatlas_full)  # type: ignore[arg-type]
        if "" in plan:
            raise RuleError(f"the model is itself one {type(model).__name__}, which has no place to be replaced in; wrap it: nn.Sequential(model)")
        target = getattr(task, "target", None) or target
        if target:
            plan = fitted(model, reachable(model), plan, inside, target)
        check_tied(model, plan)
        thirsty = [name for name, slots in plan.items() if slots.transform is not None and slots.transform.needs_peak]
        peak = peaks(model, task.calibration(), thirsty) if thirsty and task is not None else {}
    except BaseException:
        close()
        raise
    model.qatlas_rules = tuple(rules)  # type: ignore[assignment]
    return Decision(plan, inside, peak, close)


def _calibrate(model: nn.Module, task: Any) -> None:
    if task is not None and any(not q.ready or getattr(q.quant.grid, "signed", True) is None for q in quantizers(model).values()):
        task.calibrate(model)


def _plan(model: nn.Module, rules: Sequence[Rule]) -> tuple[dict[str, Slots], dict[str, dict[str, Quant]]]:
    """What the rules say of the modules that get any numbers: layer -> Slots, attention module -> signal -> Quant."""
    layers, role = reachable(model), roles(model)
    modules, parted = dict(model.named_modules()), fused.sliceable(model)
    everything = [*modules, *(name for name, _ in model.named_parameters())]
    used: set[int] = set()
    plan, inside, full = {}, {}, set()
    for name in everything:
        said: dict[str, Any] = {}
        has = _signals(layers.get(name), modules.get(name))
        for index, rule in enumerate(rules):
            if not (_meant(rule, name, role) and _stands(rule, has) and (not rule.rows or name in parted)):
                continue
            if name in layers or not _wants(rule) or rule.address:
                used.add(index)
            new = fused.spread(rule.said(), rule.rows) if name in parted else rule.said()
            said = new | _kept(rule) | said                        # what was said first stays
        if name in layers:
            said = fused.gathered(said) if name in parted else said
            slots = _slots(said, layers[name])
            if slots != Slots(keep=slots.keep):
                plan[name] = slots
        elif quants := inner.fitted(name, said) if has else None:
            inside[name] = quants
        if said.get("weight", UNSET) is None:
            full.add(name)
    for index, rule in enumerate(rules):
        if index not in used and not rule.optional:
            _unused(model, rule, index, list(layers) if _wants(rule) else everything)
    model.qatlas_full = full  # type: ignore[assignment]
    return plan, inside


def _signals(layer: type[Quantized] | None, module: nn.Module | None) -> tuple[str, ...]:
    """The signals of a module that an address can give numbers to. An embedding's input is ids."""
    if layer is not None:
        return ("weight", "output") if layer is QEmbedding else ("weight", "input", "output")
    return SLOTS if module is not None and attends(module) else ()


def _stands(rule: Rule, has: tuple[str, ...]) -> bool:
    """Whether what a rule says may stand in a module with these signals: nothing that rounds stands at the scores."""
    return rule.address in ("", *has) and (rule.address not in WATCHED or getattr(rule.signal, "watches", False))


def _kept(rule: Rule) -> dict[str, None]:
    """`keep_full` of an attention module means what is inside, too."""
    return dict.fromkeys(SLOTS) if rule.weight is rule.input is rule.output is None else {}


def _slots(said: dict[str, Any], layer: type[Quantized]) -> Slots:
    fit = ("weight", "output", "keep") if layer is QEmbedding else [field.name for field in fields(Slots)]
    return Slots(**{slot: value for slot, value in said.items() if slot in fit})


def _meant(rule: Rule, name: str, role: dict[str, set[Role]]) -> bool:
    """Whether a rule speaks of this name: by itself or, where it only keeps things full, by something that it is inside of."""
    names = [name]
    while not _wants(rule) and not rule.address and not rule.rows and "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return any(rule.matches(each, role.get(each, set())) for each in names)


def _wants(rule: Rule) -> bool:
    """Whether a rule gives numbers (then it must reach a layer), and does not only keep things full."""
    return any(value is not None for value in rule.said().values())


def _unused(model: nn.Module, rule: Rule, index: int, names: Iterable[str]) -> None:
    if rule.address or rule.rows:
        raise RuleError(f"rule {index + 1}: {(inner if rule.address else fused).lacking(model, rule.where)}")
    names = [name for name in names if name]
    leaves = sorted({name.split(".")[-1] for name in names} - {str(i) for i in range(len(names))})
    close = nearest(rule.glob, names) or [f"*.{leaf}" for leaf in nearest(rule.glob.split(".")[-1], leaves)] or leaves[:5]
    raise RuleError(f"rule {index + 1} ({rule.where!r}) matches no {'layer' if _wants(rule) else 'module'}.\n  nearest names: {', '.join(close)}\n"
                    f"  roles: {', '.join(Role)}\n"
                    "  A rule that matches nothing would leave tensors in full precision unseen; take it out or mend the name.")
