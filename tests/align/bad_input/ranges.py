"""Numbers beyond their range, key by key."""

from __future__ import annotations

from tests.align.bad_input.case import Case, recipe

OUT_OF_RANGE = {
    "objective": {
        "robust": [("beta", "0", "> 0 and finite"), ("label_smoothing", "0.5", "in [0, 0.5)")],
        "dpo_norm": [("beta", "-1", "> 0 and finite")],
        "dpop": [("beta", "0", "> 0 and finite"), ("penalty", "-1", ">= 0 and finite")],
        "ipo": [("beta", "0", "> 0 and finite"), ("reduction", "max", "'mean' or 'sum'")],
        "exo": [
            ("label_smoothing", "0", "in (0, 0.5), 0.001 in TRL; at 0 the loss is infinite"),
            ("label_smoothing", "0.5", "in (0, 0.5)"),
        ],
        "discopop": [("tau", "2", "in (0, 1], 0.05 in the paper"), ("tau", "0", "in (0, 1]")],
        "bco_pair": [("shift", "balanced", "'mean' or 'none'")],
        **{name: [("beta", "0", "> 0 and finite")] for name in ("cal_dpo", "hinge", "nca", "sppo")},
        **{name: [("beta", "-0.1", "> 0 and finite")] for name in ("apo_zero", "apo_down", "aot", "aot_unpaired")},
        "beta_dpo": [
            ("modulation", "-1", ">= 0 and finite, 0.6 in the paper"),
            ("filtered", "1", "in [0, 1), 0.2 in the paper"),
            ("momentum", "1", "in [0, 1), 0.9 in the paper"),
            ("seed", "-1", "in [0, 2³¹)"),
        ],
        "cpo": [
            ("cpo_alpha", "-1", ">= 0 and finite, 1 in the paper"),
            ("label_smoothing", "0.5", "in [0, 0.5)"),
            ("link", "squared", "'sigmoid', 'hinge' or 'ipo'"),
        ],
        "simpo": [("gamma", "-0.5", ">= 0 and finite"), ("label_smoothing", "1", "in [0, 0.5)")],
        "alpha_po": [("alpha", "11", "in [-10, 10], 0.25 in the paper"), ("gamma", "-1", ">= 0 and finite")],
        "orpo": [("beta", "0", "> 0 and finite"), ("nll", "row", "'token' or 'sequence'")],
        "tdpo": [("alpha", "-1", ">= 0 and finite, 0.5 in the paper"), ("variant", "tdpo3", "'tdpo1' or 'tdpo2'")],
        "apo_zero_unpaired": [(f"{kind}_weight", "0", "> 0 and finite") for kind in ("desirable", "undesirable")],
        "bco": [("shift", "median", "'mean' or 'balanced'")],
        "rpo_reward_aware": [
            ("reward_scale", "0", "> 0 and finite"),
            ("distance", "kl", "'bwd_kl', 'fwd_kl' or 'sq'"),
        ],
        "xpo": [("beta", "0", "> 0 and finite"), ("alpha", "0", "> 0 and finite (without it, this is dpo)")],
        "nash_md": [("beta", "-1", "> 0 and finite")],
        "sft": [("leg", "rejected", "'gold' or 'chosen'"), ("per", "batch", "'token', 'sequence' or 'row'")],
        "dco": [
            ("attempts", "0", "in [1, 2²⁰], the pass@N budget"),
            ("attempts", "1.5", "a whole number"),
            ("leg", "rejected", "'gold' or 'chosen'"),
        ],
        **{name: [("leg", "completion", "'gold' or 'chosen'")] for name in ("ntl_mse", "ntl_was")},
        "symbolic, program: chosen": [
            ("link", "log", "'logistic', 'squared' or 'hinge'"),
            ("beta", "0", "> 0 and finite"),
            ("reduction", "max", "'mean' or 'sum'"),
        ],
        "bradley_terry": [
            ("center_rewards_coefficient", "-1", ">= 0 and finite, 0.01 in TRL's documentation"),
            ("attribute", "' '", "the name of an output"),
        ],
        **{name: [("attribute", "''", "the name of an output")] for name in ("margin_bt", "scaled_bt")},
        "reward_regression": [
            *[
                ("attributes", names, "different names of columns with ratings")
                for names in ("[]", "[a, a]", "[chosen]", "[preference]")
            ],
            ("attributes", "helpfulness", "a list"),
        ],
    },
    "modifiers": {
        "r_dpo": [("length_alpha", "0", "finite and not 0, 0.005 to 0.05 at first")],
        "ld_dpo": [
            ("ld_alpha", "1", "in [0, 1) (1 changes nothing), 0.5 in the paper"),
            ("applies_to", "reference", "'both' or 'policy'"),
        ],
        "wpo": [("clamp", "1.5", "true or false")],
        "mm_dpo": [("scaling", "0", "> 0 and finite, 0.5 in the paper"), ("sharpness", "-1", "> 0 and finite")],
        "f_divergence": [
            ("divergence", "reverse_kl", "'forward_kl', 'js' or 'alpha' (reverse_kl is dpo itself)"),
            ("divergence", "js_divergence", "'forward_kl', 'js' or 'alpha'"),
            ("divergence_alpha", "1", "in [0, 1), 0.5 in TRL; 1 would be dpo itself"),
        ],
        "tr_dpo": [("sync_alpha", "0", "in (0, 1], 0.6 in TRL"), ("sync_steps", "0", ">= 1")],
    },
    "token_weights": {
        **{
            name: [
                ("temperature", "0", "> 0 and finite, 0.4 or 1 in the paper"),
                ("warmup_steps", "-1", ">= 0, 1000 in the paper's pretraining"),
            ]
            for name in ("lin_upper", "quadratic", "extremes")
        },
        **{name: [("legs", "gold", "a list")] for name in ("dft", "flow")},
    },
    "regularizers": {
        "l2_init": [("coef", "0", "> 0 and finite, 0.01 in the authors' code"), ("norm", "l3", "'l2' or 'l1'")],
        "wise_ft": [("tuned_share", "1", "in (0, 1), 0.5 in the paper"), ("tuned_share", "0", "in (0, 1)")],
    },
    "reward_transforms": {
        "log_sigmoid_centered": [("quantile", "1.5", "in [0, 1]")],
        "clip": [("lowest", "null", "a finite number, unless highest is one")],
        "clip, lowest: 1": [("highest", "0", "above lowest (1.0)")],
        "length_penalty": [("alpha", "0", "> 0 and finite")],
        "unlikeliness": [("beta_rank", "0", "in (0, 1], 0.25 in the authors' code"), ("beta_rank", "1.5", "in (0, 1]")],
        "r3": [("questions", "shut", "'open', 'closed' or 'mixed'"), ("most_words", "0", ">= 1")],
    },
}
"""By section and entry: keys, a value that each may not have, and what it must be instead."""

RANGES = [
    *[
        Case(
            name=f"{key} {value} of {name}",
            file=recipe(
                "{name: dpo}" if kind == "objective" else "",
                f"{{name: {name}, {key}: {value}}}" if kind == "objective" else "",
                more="" if kind == "objective" else f"{kind}: [{{name: {name}, {key}: {value}}}]",
            ),
            says=[f"{kind}{'' if kind == 'objective' else '.0'}.{key} must be {expected}", "got "],
        )
        for kind, entries in OUT_OF_RANGE.items()
        for name, keys in entries.items()
        for key, value, expected in keys
    ],
    *[
        Case(
            name=f"{key} of {name} is idle",
            file=recipe("name: dpo", f"name: {name}, {key}: {value}"),
            says=[f"objective.{key} has no effect: {reason}; remove it"],
        )
        for name, key, value, reason in [
            ("tdpo, variant: tdpo1", "alpha", 1, "variant tdpo1 has none"),
            ("beta_dpo, filtered: 0", "seed", 1, "with filtered 0 every row is selected"),
            ("beta_dpo, filtered: 0, modulation: 0", "momentum", 0.5, "with filtered 0 and modulation 0 this is dpo"),
        ]
    ],
    *[
        Case(
            name=f"label smoothing of a link {link} of cpo",
            words=f"--objective '{{name: cpo, link: {link}, label_smoothing: 0.1}}'",
            says=[f"objective.label_smoothing has no meaning with link {link}; use link sigmoid, or leave it out"],
        )
        for link in ("hinge", "ipo")
    ],
    *[
        Case(name=f"a program that is {what}", words=f"--objective '{{name: symbolic, {keys}}}'", says=says)
        for what, keys, says in [
            ("not there", "beta: 1", ["objective.program is required", "--program VALUE"]),
            (
                "about nobody",
                "program: rejected -> chsen",
                ["objective: 'rejected -> chsen' is no formula: 'chsen' is no variable", "write e.g. 'rejected -> "],
            ),
            ("cut off", "program: rejected ->", ["'rejected ->' is no formula: it ends too early", "write e.g. "]),
            (
                "about the reference alone",
                "program: ref_chosen",
                ["objective.program must speak of chosen or rejected"],
            ),
            (
                "compared with the reference twice",
                "program: ref_chosen -> chosen, reference: true",
                ["objective.reference subtracts what this program already names", "leave one out"],
            ),
        ]
    ],
]
