"""Faults in what objectives are put together with: parts, modifiers, references, regularizers, reward models."""

from __future__ import annotations

from tests.align.bad_input.case import Case, a_mamba, recipe

PARTS = [
    Case(
        name="a token weight without a likelihood term",
        words="--token_weights goldfish",
        says=["token_weights: goldfish weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="an adaptive one without a likelihood term",
        words="--objective bco --token_weights '[{name: talr}]'",
        says=["token_weights: talr weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="a likelihood term of weight nothing",
        words="--objective tpo --objective.alpha 0 --token_weights goldfish",
        says=["token_weights: goldfish weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="a token weight on a leg without one",
        words="--objective irpo --token_weights '[{name: goldfish, legs: [rejected]}]'",
        says=["token_weights: goldfish can't act on 'rejected'", "only chosen has a likelihood term"],
    ),
    Case(
        name="a token weight twice",
        words="--objective irpo --token_weights '[talr, talr]'",
        says=["token_weights: talr is listed twice"],
    ),
    Case(
        name="a leg twice",
        words="--objective irpo --token_weights '[{name: talr, legs: [chosen, chosen]}]'",
        says=["token_weights: talr lists a leg twice"],
    ),
    Case(
        name="a misspelt token weight",
        words="--objective irpo --token_weights goldfsh",
        says=["token_weights.name: unknown", "'goldfsh'", "did you mean 'goldfish'?"],
    ),
    Case(
        name="a misspelt relabeler",
        words="--relabel '[{name: reward_augmentd}]'",
        says=["relabel.0.name: unknown", "'reward_augmentd'", "did you mean 'reward_augmented'?"],
    ),
    Case(
        name="a misspelt key of a token weight",
        words="--objective irpo --token_weights '[{name: talr, min_wieght: 0.1}]'",
        says=["token_weights.0.min_wieght", "did you mean 'min_weight'?"],
    ),
    Case(name="a number for a relabeler", words="--relabel 3", says=["relabel must be a mapping with a name", "got 3"]),
    Case(name="no relabeler", words="--relabel '[]'", says=["relabel is empty; leave it out"]),
    Case(name="no token weight", words="--token_weights '[]'", says=["token_weights is empty; leave it out"]),
    *[
        Case(
            name=f"{name} {keys} is idle",
            words=f"--objective {objective} --token_weights '[{{name: {name}, {keys}}}]'",
            says=[f"token_weights.0.{key} has no effect: {reason}", "remove it"],
        )
        for objective, name, keys, key, reason in [
            ("irpo", "goldfish", "strategy: static, h: 4", "h", "strategy static has none"),
            ("irpo", "goldfish", "strategy: hash, start: 1", "start", "strategy hash has none"),
            ("irpo", "goldfish", "start: 1", "start", "strategy hash has none"),
        ]
    ],
    *[
        Case(
            name=f"{key} without prompt_encoder",
            file=recipe("name: dpo", f"name: bco, {key}: 2"),
            says=[f"objective.{key} has no effect: there is no prompt_encoder", "remove it"],
        )
        for key in ("min_density_ratio", "max_density_ratio", "prompt_sample_size")
    ],
    Case(
        name="two prompt encoders",
        words="--objective '[{name: bco, prompt_encoder: policy}, {name: bco, prompt_encoder: ./bert}]'",
        says=["objective: all objectives must take one prompt encoder, got 'policy', './bert'"],
    ),
    Case(
        name="flow with a live reference",
        words="--objective irpo --token_weights flow --reference.source live",
        says=["token_weights: flow takes reference {model: initial, source: cached}", "leave it out"],
    ),
    Case(
        name="flow with another reference",
        words="--objective sft --token_weights flow --reference.model ./model",
        says=["token_weights: flow takes reference {model: initial, source: cached}", "leave it out"],
    ),
    *[
        Case(
            name=f"relabelling for {objective}",
            words=f"--objective {objective} --relabel reward_augmented",
            says=[f"relabel: reward_augmented makes rows of chosen and rejected, and the objective takes {leg}"],
        )
        for objective, leg in [("sft", "gold"), ("tpo", "gold"), ("bco", "completion"), ("kto", "completion")]
    ],
    *[
        Case(name=f"{words} of {name}", words=f"{begin} {words}", says=[where, f"must be {expected}", f"got {got}"])
        for begin, name, where, values in [
            (
                "--objective irpo --token_weights '[goldfish]' --token_weights.0.name goldfish",
                "goldfish",
                "token_weights.0.",
                [
                    ("--k 1", ">= 2", "1"),
                    ("--k 2.5", "a whole number", "2.5"),
                    ("--h 0", ">= 1", "0"),
                    ("--strategy hashed", "'hash' or 'static'", "'hashed'"),
                    ("--token_weights.0.start 4", "in [0, k), k = 4", "4"),
                    ("--legs 5", "a list", "5"),
                ],
            ),
            (
                "--objective irpo --token_weights '[{name: talr}]'",
                "talr",
                "token_weights.0.",
                [
                    ("--min_weight 0", "in (0, 1]", "0.0"),
                    ("--min_weight 1.5", "in (0, 1]", "1.5"),
                    ("--min_tau 0", "> 0 and finite", "0.0"),
                    ("--min_tau nan", "a finite number", "'nan'"),
                ],
            ),
            (
                "--relabel '[{name: reward_augmented}]'",
                "reward_augmented",
                "relabel.0.",
                [
                    ("--form prompt", "'system' or 'text'", "'prompt'"),
                    ("--highest 0", "above lowest (1) and finite", "0.0"),
                    ("--decimals 9", "in [0, 6]", "9"),
                ],
            ),
            (
                "--objective bco",
                "bco",
                "objective.",
                [
                    ("--beta 0", "> 0 and finite", "0.0"),
                    ("--prompt_encoder policy --min_density_ratio -1", ">= 0 and finite", "-1.0"),
                    ("--prompt_encoder policy --max_density_ratio 0.1", "at least min_density_ratio (0.5)", "0.1"),
                    ("--prompt_encoder policy --prompt_sample_size 0", ">= 1", "0"),
                ],
            ),
            ("--objective kto", "kto", "objective.", [("--desirable_weight 0", "> 0 and finite", "0.0")]),
            (
                "--objective tpo",
                "tpo",
                "objective.",
                [
                    ("--alpha -1", ">= 0 and finite", "-1.0"),
                    ("--label_smoothing 0.5", "in [0, 0.5)", "0.5"),
                    ("--link log", "'sigmoid', 'hinge' or 'ipo'", "'log'"),
                ],
            ),
            ("--objective tpo_l", "tpo_l", "objective.", [("--gamma -1", ">= 0 and finite", "-1.0")]),
            (
                "--objective rpo",
                "rpo",
                "objective.",
                [
                    ("--eta 0", "> 0 and finite", "0.0"),
                    ("--objective.form mean", "'cumulative' or 'average'", "'mean'"),
                ],
            ),
            (
                "--objective irpo",
                "irpo",
                "objective.",
                [("--alpha 0", "> 0 and finite", "0.0"), ("--objective.form row", "'token' or 'sequence'", "'row'")],
            ),
        ]
        for words, expected, got in values
    ],
    Case(
        name="a prompt encoder without name",
        file=recipe("name: dpo", "name: bco, prompt_encoder: ' '"),
        says=["objective.prompt_encoder must be null, 'policy' or an encoder", "got ' '"],
    ),
    Case(
        name="smoothing of a hinge",
        words="--objective tpo --link hinge --label_smoothing 0.1",
        says=["objective", "label_smoothing has no meaning with link hinge", "use link sigmoid, or leave it out"],
    ),
]

NOT_ABOUT_PAIRS = "it is not about log-probs of pairs"
PER_TOKEN = "its log-probs are per token, so length is accounted for"
ONE_BY_ONE = "each reward enters by itself, not the difference alone, so log Z(x) would not cancel"
COUPLED = "its rows are coupled by the step"
NO_BETA = "it has no β to scale, or sets β itself"
SENSELESS = {
    "r_dpo": {
        **dict.fromkeys(["ipo", "simpo", "dpo_norm", "orpo", "tpo_l", "alpha_po"], PER_TOKEN),
        **dict.fromkeys(["nca", "bco_pair", "sppo", "apo_zero", "apo_down", "dpop", "cal_dpo", "tdpo"], ONE_BY_ONE),
        **dict.fromkeys(["aot", "aot_unpaired", "beta_dpo"], COUPLED),
        **dict.fromkeys(["kto", "bco", "sft", "dco", "ntl_was", "bradley_terry", "nash_md"], NOT_ABOUT_PAIRS),
    },
    "ld_dpo": {
        "tdpo": "it compares whole distributions token by token",
        **dict.fromkeys(["kto", "sft", "reward_regression"], NOT_ABOUT_PAIRS),
    },
    "wpo": {
        **dict.fromkeys(["aot", "beta_dpo"], f"{COUPLED}, so a row has no loss of its own to weigh"),
        **dict.fromkeys(["bco", "sft", "dco", "scaled_bt"], NOT_ABOUT_PAIRS),
    },
    "mm_dpo": {
        "aot_unpaired": COUPLED,
        **dict.fromkeys(["beta_dpo", "orpo"], NO_BETA),
        **dict.fromkeys(["apo_zero_unpaired", "sft", "margin_bt"], NOT_ABOUT_PAIRS),
    },
    "f_divergence": {
        **dict.fromkeys(["cpo", "simpo", "orpo", "tpo"], "it has no reference to diverge from"),
        **dict.fromkeys(["nca", "dpop", "tdpo"], ONE_BY_ONE),
        **dict.fromkeys(["aot", "beta_dpo"], COUPLED),
        **dict.fromkeys(["kto", "ntl_mse"], NOT_ABOUT_PAIRS),
    },
    "tr_dpo": dict.fromkeys(["simpo", "cpo", "orpo", "tpo", "sft", "dco", "bradley_terry"], "it has no reference"),
}
"""Modifiers, the objectives that they make no sense for, and why."""

MODIFIERS = [
    *[
        Case(
            name=f"{modifier} of {objective}",
            words=f"--objective {objective} --modifiers {modifier}",
            says=[f"modifiers: {modifier} has nothing to act on: it makes no sense for {objective}: {reason}"],
        )
        for modifier, objectives in SENSELESS.items()
        for objective, reason in objectives.items()
    ],
    Case(
        name="a modifier of neither of two objectives",
        words="--objective '[{name: sft, leg: chosen}, {name: aot}]' --modifiers f_divergence",
        says=[f"f_divergence has nothing to act on: it makes no sense for sft: {NOT_ABOUT_PAIRS}", f"aot: {COUPLED}"],
    ),
    Case(
        name="the second of two modifiers",
        words="--objective simpo --modifiers '[wpo, r_dpo]'",
        says=[f"modifiers: r_dpo has nothing to act on: it makes no sense for simpo: {PER_TOKEN}"],
    ),
    Case(
        name="a modifier of a program per token",
        words="--objective '{name: symbolic, program: rejected -> chosen}' --modifiers r_dpo",
        says=[f"r_dpo has nothing to act on: it makes no sense for symbolic: {PER_TOKEN}"],
    ),
    *[
        Case(
            name=f"{name} twice",
            words=f"--modifiers '[{name}, wpo, {name}]'",
            says=[f"modifiers: {name} is listed twice"],
        )
        for name in ("r_dpo", "f_divergence")
    ],
    Case(
        name="two answers to length",
        words="--modifiers '[ld_dpo, {name: r_dpo, length_alpha: 0.1}]'",
        says=["modifiers: r_dpo and ld_dpo both take the effect of length away", "keep one"],
    ),
    Case(
        name="a misspelt modifier",
        words="--modifiers wop",
        says=["modifiers.name: unknown modifier 'wop'; did you mean 'wpo'?", "known: f_divergence, ld_dpo"],
    ),
    Case(
        name="a misspelt modifier in a list",
        file=recipe(more="modifiers: [wpo, {name: r_dop}]"),
        says=["modifiers.1.name: unknown modifier 'r_dop'; did you mean 'r_dpo'?"],
    ),
    Case(
        name="a misspelt key of a modifier",
        words="--modifiers '{name: wpo, clmap: true}'",
        says=["modifiers.clmap; did you mean 'clamp'?"],
    ),
    Case(
        name="TRL's key of a modifier",
        file=recipe(more="modifiers: [{name: tr_dpo, ref_model_sync_steps: 64}]"),
        says=["modifiers.0.ref_model_sync_steps", "did you mean 'sync_steps'?"],
    ),
    Case(
        name="a misspelt section of modifiers", words="--modifier wpo", says=["--modifier", "did you mean 'modifiers'?"]
    ),
    Case(
        name="a listed modifier without its number",
        words="--modifiers '[wpo]' --modifiers.clamp false",
        says=["--modifiers.clamp: the recipe lists several modifiers; write --modifiers.0.clamp"],
    ),
    Case(
        name="a number beyond the modifiers",
        words="--modifiers '[wpo, mm_dpo]' --modifiers.2.scaling 1",
        says=["--modifiers.2.scaling: the recipe has 2 listed modifiers, numbered from 0"],
    ),
    *[
        Case(name=f"no {kind}", words=f"--{kind} '[]'", says=[f"{kind} is empty; leave it out, or write null"])
        for kind in ("modifiers", "regularizers")
    ],
    *[
        Case(name=f"a number for {kind}", words=f"--{kind} 3", says=[f"{kind} must be a mapping with a name", "got 3"])
        for kind in ("modifiers", "regularizers")
    ],
    Case(
        name="a name for a key",
        file=recipe(more="modifiers: {wpo: {clamp: true}}"),
        says=["modifiers must be a mapping with a name", "got {'wpo': {'clamp': True}}"],
    ),
    *[
        Case(
            name=f"an α of divergence {divergence}",
            words=f"--modifiers '{{name: f_divergence, divergence: {divergence}, divergence_alpha: 0.3}}'",
            says=[f"modifiers.divergence_alpha has no effect: divergence {divergence} has none; remove it"],
        )
        for divergence in ("js", "forward_kl")
    ],
]

TDPO_CACHED = [
    "objective: tdpo compares whole distributions of policy and reference, and reference.source cached keeps one",
    "set reference.source to live, or with a lora section to adapter_off",
]
REFERENCES = [
    Case(name="tdpo with a cache", words="--objective tdpo", says=TDPO_CACHED),
    Case(name="tdpo with a cache and an adapter", words="--objective tdpo --lora.r 4", says=TDPO_CACHED),
    Case(name="tdpo among others", words="--objective '[{name: dpo}, {name: tdpo}]'", says=TDPO_CACHED),
    Case(
        name="tdpo with the adapter off and none there",
        words="--objective tdpo --reference.source adapter_off",
        says=["reference.source adapter_off needs a lora section"],
    ),
    Case(
        name="tr_dpo with a cache",
        words="--modifiers tr_dpo",
        says=["modifiers: tr_dpo moves the reference, which a cache can't; set reference.source to live"],
    ),
    *[
        Case(
            name=f"tr_dpo with an adapter and a reference {source}",
            words=f"--modifiers tr_dpo --lora.r 4 --reference.source {source}",
            says=["modifiers: tr_dpo moves all weights of the reference; leave the lora section out"],
        )
        for source in ("cached", "live", "adapter_off")
    ],
    Case(
        name="tr_dpo with flow",
        words="--objective irpo --modifiers tr_dpo --reference.source live --token_weights flow",
        says=["modifiers: tr_dpo moves the reference that token_weights take from the start; keep one"],
    ),
    *[
        Case(
            name=f"a reference that {objective} needs none of",
            words=f"--objective {objective} --reference.source live",
            says=[f"reference has no effect: {objective} needs no reference model; remove the section"],
        )
        for objective in ("simpo", "orpo", "bradley_terry")
    ],
]

REGULARIZERS = [
    Case(
        name="a misspelt regularizer",
        words="--regularizers l2_int",
        says=["regularizers.name: unknown regularizer 'l2_int'; did you mean 'l2_init'?", "known: l2_init, wise_ft"],
    ),
    Case(
        name="a misspelt key of a regularizer",
        words="--regularizers '[{name: wise_ft, tuned_shre: 0.5}]'",
        says=["regularizers.0.tuned_shre; did you mean 'tuned_share'?"],
    ),
    Case(
        name="a misspelt section of regularizers",
        file=recipe(more="regularisers: l2_init"),
        says=["unknown section 'regularisers'; did you mean 'regularizers'?"],
    ),
    *[
        Case(
            name=f"{name} twice",
            words=f"--regularizers '[{name}, {name}]'",
            says=[f"regularizers: {name} is listed twice; keep one"],
        )
        for name in ("l2_init", "wise_ft")
    ],
    *[
        Case(
            name=f"l2_init of an adapter, {words}",
            words=f"--regularizers {words} --lora.r 4",
            says=["regularizers: l2_init is of all weights, and with a lora section they don't move; leave one out"],
        )
        for words in ("l2_init", "'[wise_ft, l2_init]'")
    ],
    *[
        Case(
            name=f"wise_ft with {words}",
            words=f"--regularizers wise_ft {words}",
            says=[
                "regularizers: wise_ft needs an adapter that starts as nothing and is a sum of weights",
                "leave lora.adapter_name_or_path, lora.modules_to_save and lora.use_dora out",
            ],
        )
        for words in ("--lora.use_dora true", "--modules_to_save '[lm_head]'", "--adapter_name_or_path ./adapter")
    ],
    Case(
        name="a misspelt reward transform",
        words="--reward_transforms zscore",
        says=["reward_transforms.name: unknown reward transform 'zscore'; did you mean 'z_score'?"],
    ),
    Case(
        name="a misspelt sample weight",
        words="--objective irpo --token_weights lin_uper",
        says=["token_weights.name: unknown token weight 'lin_uper'; did you mean 'lin_upper'?"],
    ),
    Case(
        name="a sample weight without a likelihood term",
        words="--token_weights lin_upper",
        says=["token_weights: lin_upper weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="a sample weight twice",
        words="--objective irpo --token_weights '[lin_upper, dft, lin_upper]'",
        says=["token_weights: lin_upper is listed twice"],
    ),
]

REWARD_MODELS = [
    *[
        Case(
            name=f"{first} beside {second}",
            words=f"--objective '[{{name: {first}}}, {{name: {second}}}]'",
            says=[f"objective: {head} trains a scalar head and {other} a language model; take one of them"],
        )
        for first, second, head, other in [
            ("bradley_terry", "dpo", "bradley_terry", "dpo"),
            ("kto", "reward_regression", "reward_regression", "kto"),
            ("simpo", "scaled_bt", "scaled_bt", "simpo"),
        ]
    ],
    Case(
        name="a token weight of a reward model",
        words="--objective bradley_terry --token_weights dft",
        says=["token_weights: dft weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="an architecture without scalar heads",
        words="--objective bradley_terry --model_name_or_path ./mamba",
        arrange=a_mamba,
        says=["'./mamba' is a mamba model, for which transformers has no scalar head; name another model"],
    ),
    Case(
        name="a module to save that a reward model has not",
        words="--objective bradley_terry --lora.modules_to_save '[lm_head]'",
        says=["lora.modules_to_save: no module of the model is called 'lm_head'", "score"],
    ),
]
