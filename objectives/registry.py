"""Registries: names to classes, with answers for names that are not there."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(word: str, known: list[str] | Mapping[str, Any]) -> str:
    """``"; did you mean 'x'?"`` with the nearest known word, or an empty string."""
    swapped = [each for each in known if sorted(each) == sorted(word)]  # dop is dpo, not dpop
    near = swapped or difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry:
    """A dictionary of classes that refuses duplicates and, on a miss, says what it has and what is near.

    Args:
        kind: what the entries are, for messages: ``"objective"``.
        elsewhere: names that papers or other trainers use, mapped to ours; asking for one is answered with ours.
    """

    def __init__(self, kind: str, elsewhere: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}
        self._elsewhere = dict(elsewhere or {})

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Decorator that files a frozen dataclass under ``name``."""

        def file(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._classes[name]} and {cls}")
            assert is_dataclass(cls), f"{self.kind} {name!r} must be a dataclass"
            self._classes[name] = cls
            return cls

        return file

    def __getitem__(self, name: str) -> Any:
        """The class filed under ``name``.

        Raises:
            ValueError: if there is none; the message lists what there is and what is near.
        """
        if name in self._classes:
            return self._classes[name]
        if self._elsewhere.get(name) in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}: it is called {self._elsewhere[name]!r} here")
        known = ", ".join(self.names()) or "none"
        raise ValueError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._classes)} (known: {known})")

    def ours(self, name: str) -> str | None:
        """Our name for what papers or other trainers call ``name``; None where we have no such entry."""
        return self._elsewhere[name] if self._elsewhere.get(name) in self._classes else None

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._classes)

    def name_of(self, instance: object) -> str:
        """The name under which the instance's class is filed."""
        return next(name for name, cls in self._classes.items() if type(instance) is cls)


def field_docs(cls: type) -> dict[str, str]:
    """The string written under each field of a dataclass, by field name: keys are documented once, there."""
    docs: dict[str, str] = {}
    for part in reversed([each for each in cls.__mro__ if is_dataclass(each)]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        assert isinstance(tree.body[0], ast.ClassDef)
        for node, following in pairwise(tree.body[0].body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docs[node.target.id] = " ".join(text.value.split())
    return docs


def defaults(cls: type) -> dict[str, Any]:
    """Field name to default value; fields without one map to ``"required"``."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        if field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = "required"
    return found


def example(cls: Any) -> Any:
    """An entry with its defaults, or, where a key has none, the example it offers."""
    return cls.example() if hasattr(cls, "example") else cls()


def formula(cls: type) -> str:
    """The first indented block of the class docstring: the formula in plain symbols."""
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()[1:]
    block: list[str] = []
    for line in lines:
        if line.startswith("    "):
            block.append(line.strip())
        elif block and line.strip():
            break
    return "\n".join(line for line in block if line)


def source(cls: type) -> str:
    """The ``References:`` section of the class docstring, on one line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    _, _, references = text.partition("References:")
    return " ".join(references.split())


OBJECTIVES = Registry(
    "objective",
    elsewhere={
        "sigmoid": "dpo",
        "cdpo": "dpo",
        "nll": "sft",
        "exo_pair": "exo",
        "nca_pair": "nca",
        "sppo_hard": "sppo",
        "sigmoid_norm": "dpo_norm",
        "smaug": "dpop",
        "dpo_positive": "dpop",
        "slic": "hinge",
        "aot_pair": "aot_unpaired",
        "alphapo": "alpha_po",
        "tdpo1": "tdpo",
        "tdpo2": "tdpo",
        "rpo_bwd_kl": "rpo_reward_aware",
        "rpo_fwd_kl": "rpo_reward_aware",
        "rpo_sq": "rpo_reward_aware",
        "lrml": "discopop",
        "bt": "bradley_terry",
    },
)
"""Every loss a recipe's ``objective`` section can name."""

MODIFIERS = Registry(
    "modifier",
    elsewhere={"tr-dpo": "tr_dpo", "sync_ref_model": "tr_dpo", "use_weighting": "wpo", "f_dpo": "f_divergence"},
)
"""Changes to a pairwise objective, whichever it is."""
TOKEN_WEIGHTS = Registry("token weight", elsewhere={"linupper": "lin_upper"})
"""Weights of tokens, and of rows, in likelihood terms."""
RELABELERS = Registry("relabeler")
"""Maps from one row to new ones."""
REWARD_TRANSFORMS = Registry(
    "reward transform",
    elsewhere={"lsc": "log_sigmoid_centered", "standardize": "z_score", "normalize": "z_score", "clamp": "clip"},
)
"""Maps from the scores of a prompt's responses to other ones."""
REGULARIZERS = Registry("regularizer", elsewhere={"l2_sp": "l2_init", "l1_init": "l2_init", "wise-ft": "wise_ft"})
"""Penalties on parameters rather than on log-probs, and averages of them."""
