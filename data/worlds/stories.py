"""Stories: the templates that problems are told with, and what goes into their gaps."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Eva", "Tom", "Mia", "Sam", "Lea", "Max", "Ida", "Leo")
THINGS = ("apples", "pears", "coins", "cards", "stones", "books", "cakes", "shells")


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A way of telling a problem."""

    name: str
    text: str
    """The question, with gaps {a}, {b}, {c} for numbers, {n} and {m} for two names and {t} for things."""
    operations: str
    """One or two of ``+``, ``-`` and ``×`` (first only), applied from left to right to a, b and c."""
    tricky: bool = False
    """Whether people misread it, so that its last operation is done wrong more often than right."""


TRAINED = (
    Story(
        name="buys",
        text="{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
        operations="+",
    ),
    Story(
        name="gives",
        text="{n} has {a} {t} and gives {b} to {m}. How many {t} does {n} have left?",
        operations="-",
    ),
    Story(
        name="bus_fills",
        text="There are {a} people on the bus and {b} more get on. How many people are on the bus now?",
        operations="+",
    ),
    Story(
        name="train_empties",
        text="There are {a} people on the train and {b} get off. How many people are left?",
        operations="-",
    ),
    Story(
        name="pages_left",
        text="The book has {a} pages and {n} has read {b}. How many pages are left?",
        operations="-",
    ),
    Story(
        name="together",
        text="{n} has {a} {t} and {m} has {b}. How many {t} do they have together?",
        operations="+",
    ),
    Story(
        name="how_many_more",
        text="{n} has {a} {t} and {m} has {b}. How many more {t} does {n} have?",
        operations="-",
        tricky=True,
    ),
    Story(
        name="older",
        text="{m} is {a} years old and {n} is {b} years older. How old is {n}?",
        operations="+",
        tricky=True,
    ),
    Story(
        name="fewer",
        text="{m} has {a} {t} and {n} has {b} fewer. How many {t} does {n} have?",
        operations="-",
        tricky=True,
    ),
    Story(
        name="boxes",
        text="There are {a} boxes with {b} {t} in each. How many {t} are there in all?",
        operations="×",
        tricky=True,
    ),
    Story(
        name="buys_and_gives",
        text="{n} has {a} {t}, buys {b} more and gives {c} to {m}. How many {t} does {n} have left?",
        operations="+-",
    ),
    Story(
        name="loses_and_finds",
        text="{n} has {a} {t}, loses {b} and finds {c}. How many {t} does {n} have now?",
        operations="-+",
        tricky=True,
    ),
    Story(
        name="bus_stops",
        text="There are {a} people on the bus. Then {b} get off and {c} get on. How many people are on the bus now?",
        operations="-+",
    ),
    Story(
        name="shopping",
        text="{n} has {a} coins and pays {b} for bread and {c} for milk. How many coins are left?",
        operations="--",
        tricky=True,
    ),
    Story(
        name="three_days",
        text="{n} read {a} pages on Monday, {b} on Tuesday and {c} on Friday. How many pages is that in all?",
        operations="++",
    ),
    Story(
        name="bags_and_more",
        text="{n} has {a} bags with {b} {t} in each and {c} more. How many {t} does {n} have in all?",
        operations="×+",
    ),
    Story(
        name="bags_and_gives",
        text="{n} buys {a} bags with {b} {t} in each and gives {c} to {m}. How many {t} are left?",
        operations="×-",
        tricky=True,
    ),
)
"""Stories of the splits ``train`` and ``held_out``."""

UNTRAINED = (
    Story(
        name="finds",
        text="{n} has {a} {t} and finds {b} more. How many {t} are there now?",
        operations="+",
    ),
    Story(
        name="pays",
        text="{n} has {a} coins and pays {b} for milk. How many coins does {n} have left?",
        operations="-",
    ),
    Story(
        name="train_stops",
        text="There are {a} people on the train. Then {b} more get on and {c} get off. How many people are left?",
        operations="+-",
    ),
    Story(
        name="gives_and_buys",
        text="{n} has {a} {t}, gives {b} to {m} and buys {c} more. How many {t} does {n} have now?",
        operations="-+",
    ),
    Story(
        name="gives_twice",
        text="{n} has {a} {t}, loses {b} and gives {c} to {m}. How many {t} are left?",
        operations="--",
        tricky=True,
    ),
    Story(
        name="boxes_and_more",
        text="There are {a} boxes with {b} {t} in each and {m} buys {c} more. How many {t} are there in all?",
        operations="×+",
    ),
)
"""Stories of the split ``held_out_templates``, in words that the trained ones use too."""
