"""Data that an objective can't be served with, and what turns rows into others."""

from __future__ import annotations

from typing import Any

from tests.align.bad_input.case import Case, each, without_digits
from tests.align.runs import pairs

OTHERS = "or use an objective that works with this data:"


def scored(*scores: float, number: int = 8) -> list[dict[str, Any]]:
    """Rows with one response for each score."""
    return [
        {"prompt": f"Say {i}.", "responses": [{"text": f" It is {j}, {i}.", "score": s} for j, s in enumerate(scores)]}
        for i in range(number)
    ]


def rated(**ratings: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {i}.", "completion": f" {i}!", **ratings} for i in range(8)]


def labelled(*labels: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {i}.", "completion": f" {i}!", "label": label} for i, label in enumerate(labels)]


NEED_BOTH = (
    "rows.jsonl, row 0: the objective needs scores of chosen and rejected and the rows have prompt, chosen, reject"
)
ADD_BOTH = "add score_chosen and score_rejected columns, or a margin (data.columns maps names)"
NO_RATING = "and no row has a score of it (scores there: "

SHAPES = [
    *[
        Case(
            name=f"no scores for {objective}",
            words=f"--objective {objective}",
            says=[NEED_BOTH, ADD_BOTH, OTHERS, "dpo, ipo, simpo"],
        )
        for objective in ("rpo_reward_aware", "margin_bt", "scaled_bt")
    ],
    Case(
        name="no scores for a reward transform",
        words="--reward_transforms z_score",
        says=["rows.jsonl: reward_transforms change the scores of several responses", "use lists of scored", "leave"],
    ),
    Case(name="no scores for a modifier", words="--modifiers mm_dpo", says=[NEED_BOTH, ADD_BOTH]),
    *[
        Case(
            name=f"no score of the {lacking} response",
            words="--objective rpo_reward_aware",
            rows=each(**{f"score_{there}": 2.0}),
            says=[f"row 0: the objective needs scores of {lacking}", f"add score_{lacking}", OTHERS, "dpo, ipo"],
        )
        for there, lacking in [("chosen", "rejected"), ("rejected", "chosen")]
    ],
    Case(
        name="one row without scores",
        words="--objective scaled_bt",
        rows=[row | ({} if i == 5 else {"score_chosen": 2, "score_rejected": 1}) for i, row in enumerate(pairs())],
        says=["rows.jsonl, row 5: the objective needs scores of chosen and rejected and this row has", ADD_BOTH],
    ),
    Case(
        name="a margin that is no number",
        words="--objective margin_bt",
        rows=each(margin="much"),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: margin is not a finite number", "mend the rows"],
    ),
    Case(
        name="neither pairs nor scores",
        words="--objective margin_bt",
        rows=labelled(True, False),
        says=[
            "row 0: the objective needs chosen and rejected responses and scores of chosen and rejected",
            *("add chosen, rejected, score_chosen and score_rejected columns", OTHERS, "kto, bco"),
        ],
    ),
    *[
        Case(
            name=f"no rating of {attribute}, {what}",
            words=f"--objective '{{name: reward_regression, attributes: [{names}]}}'",
            rows=rows,
            says=[
                f"rows.jsonl: the objective learns the attribute {attribute!r}, {NO_RATING}{there})",
                f"add a column {attribute}, map one with data.columns, or change the objective's attributes",
            ],
        )
        for what, names, attribute, there, rows in [
            ("of pairs", "score", "score", "none", pairs()),
            ("of completions", "helpfulness", "helpfulness", "none", rated()),
            ("but of another", "helpfulness, wit", "wit", "helpfulness", rated(helpfulness=3)),
            ("but empty ones", "wit", "wit", "none", rated(wit=None)),
            ("of labels", "score", "score", "none", labelled(True, False)),
        ]
    ],
    Case(
        name="a rating that is no number",
        words="--objective '{name: reward_regression, attributes: [wit]}'",
        rows=rated(wit="some"),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: wit is not a finite number", "mend the rows"],
    ),
    Case(
        name="a rating mapped to no column",
        words="--objective '{name: reward_regression, attributes: [wit]}' --columns '{wit: humour}'",
        rows=rated(humor=3),
        says=["rows.jsonl: data.columns maps wit to 'humour', which is not there", "did you mean 'humor'?"],
    ),
    Case(
        name="a rating mapped from another attribute",
        words="--objective '{name: reward_regression, attributes: [wit]}' --columns '{wits: humor}'",
        rows=rated(humor=3),
        says=["data.columns: 'wits' is no column of ours; did you mean 'wit'?"],
    ),
    Case(
        name="nobody who wrote the chosen responses",
        words="--objective xpo",
        says=[
            "rows.jsonl, row 0: the objective needs chosen_by, who wrote the chosen response, and the rows have prompt",
            *("add a chosen_by column with policy or reference (data.columns maps names)", OTHERS, "dpo, ipo"),
        ],
    ),
    Case(
        name="one row of which nobody knows who wrote it",
        words="--objective xpo",
        rows=[row | {"chosen_by": None if i == 5 else "policy"} for i, row in enumerate(pairs())],
        says=["rows.jsonl, row 5: the objective needs chosen_by", "this row has", "add a chosen_by column", OTHERS],
    ),
    Case(
        name="a writer that is neither",
        words="--objective xpo",
        rows=each(chosen_by="gpt"),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: chosen_by is not policy or reference", "mend the rows"],
    ),
    Case(
        name="a writer mapped from another column",
        words="--objective xpo --columns '{chosen_buy: by}'",
        rows=each(by="policy"),
        says=["data.columns: 'chosen_buy' is no column of ours; did you mean 'chosen_by'?"],
    ),
    Case(
        name="no preference of samples",
        words="--objective nash_md",
        rows=rated(),
        says=[
            "rows.jsonl, row 0: the objective needs preference, the probability that the completion is preferred",
            *("add a preference column with a number in [0, 1]", OTHERS, "sft"),
        ],
    ),
    Case(
        name="a preference of pairs",
        words="--objective nash_md",
        rows=each(preference=0.5),
        says=["row 0: the objective needs preference", "give a completion response that is the row's own", OTHERS],
    ),
    Case(
        name="a preference in percent",
        words="--objective nash_md",
        rows=rated(preference=70),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: preference is not a number in [0, 1]", "mend the rows"],
    ),
    Case(
        name="a preference from scores",
        words="--objective nash_md",
        rows=scored(0.9, 0.1),
        says=["row 0: the objective needs preference", "responses with scores; add a preference column", OTHERS],
    ),
    Case(
        name="no log-probs for unlikeliness",
        words="--reward_transforms unlikeliness",
        rows=scored(1, 1, 0),
        says=["rows.jsonl, row 0: unlikeliness ranks responses by their log-probs", "give each its mean", "leave unl"],
    ),
    Case(
        name="a relabeler of pairs whose writer matters",
        words="--objective xpo --relabel '{name: reward_augmented, form: text}'",
        rows=each(chosen_by="policy", score_chosen=2, score_rejected=1),
        says=["relabel rewrites chosen and rejected, and the objective needs chosen_by", "leave relabel out"],
    ),
    *[
        Case(
            name=f"no gold for {objective}",
            words=f"--objective {objective}",
            says=["row 0: the objective needs a gold response", "add a gold or reference column", OTHERS, "dpo, ipo"],
        )
        for objective in ("dco", "ntl_mse", "ntl_was", "tpo_l")
    ],
    *[
        Case(
            name=f"no pairs for {objective}",
            words=f"--objective {objective} {more}",
            rows=labelled(True, False, True, False),
            says=[
                "row 0: the objective needs chosen and rejected responses",
                "add chosen and rejected columns",
                OTHERS,
            ],
        )
        for objective, more in [("simpo", ""), ("tdpo", "--reference.source live"), ("aot", ""), ("bradley_terry", "")]
    ],
    Case(
        name="thumbs up only for apo_zero_unpaired",
        words="--objective apo_zero_unpaired",
        rows=labelled(*[True] * 8),
        says=["rows.jsonl: all 8 training rows have label true", "add rows with label false"],
    ),
    Case(
        name="a tokenizer without digits",
        words="--objective '[{name: sft, leg: chosen}, {name: ntl_was, leg: chosen}]'",
        rows=[{"prompt": "Say it.", "chosen": f" {'a' * (i + 1)}.", "rejected": " No."} for i in range(8)],
        arrange=without_digits,
        says=["the tokenizer has 1 number tokens", "use a tokenizer that splits numbers into digits, or another objec"],
        model_loaded=True,
    ),
    Case(
        name="no gold for tpo",
        words="--objective tpo",
        says=[
            "rows.jsonl, row 0: the objective needs a gold response and the rows have prompt, chosen, rejected",
            *(
                "add a gold or reference column (data.columns maps names)",
                OTHERS,
                "dpo, ipo, simpo, orpo, rpo, kto, bco",
            ),
        ],
    ),
    Case(
        name="no label for bco",
        words="--objective bco",
        rows=[{"prompt": f"Say {i}.", "completion": f" {i}!"} for i in range(8)],
        says=[
            "rows.jsonl, row 0: the objective needs a label and the rows have prompt, completion",
            *("add a label column with true and false (data.columns maps names)", OTHERS, "sft"),
        ],
    ),
    Case(
        name="no pairs for dpo",
        rows=labelled(True, False, True, False),
        says=[
            "rows.jsonl, row 0: the objective needs chosen and rejected responses",
            *("the rows have prompt, completion, label", "add chosen and rejected columns", OTHERS, "kto, bco"),
        ],
    ),
    Case(
        name="nothing that tpo needs",
        words="--objective tpo",
        rows=labelled(True, False),
        says=["needs chosen, rejected and gold responses", "add chosen, rejected and gold (or reference) columns"],
    ),
    Case(
        name="two responses for a triple",
        words="--objective tpo",
        rows=scored(0.1, 0.9),
        says=["rows.jsonl: no row can be trained on (8 × fewer than three responses with scores", "change data.rule"],
    ),
    Case(
        name="thumbs up only",
        words="--objective kto",
        rows=labelled(*[True] * 8),
        says=["rows.jsonl: all 8 training rows have label true", "add rows with label false", "sft with data.format"],
    ),
    Case(
        name="thumbs down only",
        words="--objective bco",
        rows=labelled(*[False] * 8),
        says=["rows.jsonl: all 8 training rows have label false", "add rows with label true"],
    ),
    Case(
        name="no other prompt for kto",
        words="--objective kto",
        rows=[row | {"prompt": "Say."} for row in labelled(True, False, True, False)],
        says=["all 4 rows have the same prompt", "completions of another one", "add rows with other prompts"],
    ),
    Case(
        name="scores all equal",
        rows=scored(0.5, 0.5, 0.5),
        says=["rows.jsonl: all scores are 0.5", "give scores that differ, or use an objective that takes one", "sft"],
    ),
    Case(
        name="scores that nothing tells apart",
        words="--data.margin 0.3",
        rows=scored(0.5, 0.6),
        says=["rows.jsonl: no row can be trained on (8 × scores differ by less than data.margin", "change data.rule"],
    ),
    Case(
        name="a threshold that none reaches",
        words="--rule threshold --threshold 3",
        rows=scored(0.5, 0.6),
        says=["rows.jsonl: no row can be trained on (8 × no response scores at least data.threshold"],
    ),
    Case(
        name="labels by a threshold that none reaches",
        words="--objective kto --rule threshold --threshold 3",
        rows=scored(0.5, 0.6),
        says=["all 16 training rows have label false", "change data.threshold"],
    ),
    Case(
        name="rule threshold without threshold",
        words="--rule threshold",
        says=["data.rule threshold needs data.threshold", "the least score of a good response"],
    ),
    Case(
        name="a threshold with another rule",
        words="--data.threshold 0.5",
        says=["data.threshold has no effect: data.rule is not threshold", "remove it"],
    ),
    Case(
        name="rule margin without margin",
        words="--rule margin",
        says=["data.rule margin needs data.margin", "> 0"],
    ),
    Case(name="a margin below nothing", words="--data.margin -1", says=["data.margin must be >= 0", "got -1.0"]),
    Case(
        name="an unknown rule",
        words="--rule best_vs_best",
        says=["data.rule must be one of best_vs_worst, best_vs_random, threshold, margin", "'best_vs_best'"],
    ),
    Case(
        name="a rule for pairs",
        words="--rule best_vs_random",
        says=["data.margin and data.max_length_ratio say how scored", "leave them out"],
    ),
    Case(
        name="a rule for one response",
        words="--objective sft --rule best_vs_random",
        rows=scored(0.5, 0.6),
        says=["data.rule best_vs_random has no effect", "the best of the scored responses (gold)", "leave out"],
    ),
    Case(
        name="a margin of labels by threshold",
        words="--objective bco --rule threshold --threshold 0.55 --data.margin 0.1",
        rows=scored(0.5, 0.6),
        says=["data.margin has no effect", "every response gets a label", "leave it out"],
    ),
    Case(name="streaming without end", words="--streaming", says=["data.streaming needs data.max_rows"]),
    Case(
        name="relabelling without scores",
        words="--relabel '[{name: reward_augmented, form: text}]'",
        says=[
            "rows.jsonl, row 0: reward_augmented needs a score of the chosen response",
            "add columns score_chosen and score_rejected, use lists of scored responses, or leave relabel out",
        ],
    ),
    Case(
        name="scores outside the scale",
        words="--relabel '[{name: reward_augmented, form: text}]'",
        rows=each(score_chosen=11, score_rejected=3),
        says=["rows.jsonl, row 0: the score 11 is outside the scale from 1 to 10", "set relabel's lowest and highest"],
    ),
    Case(
        name="a system message in plain text",
        words="--relabel reward_augmented",
        rows=each(score_chosen=9, score_rejected=3),
        says=["rows.jsonl, row 0: plain text has no system message", "set data.as_chat, or relabel's form to text"],
    ),
    Case(
        name="scores that print alike",
        words="--relabel '[{name: reward_augmented, form: text, decimals: 0}]'",
        rows=each(score_chosen=9.3, score_rejected=9.1),
        says=["rows.jsonl: no row can be trained on (8 × chosen and rejected have the same score"],
    ),
]
