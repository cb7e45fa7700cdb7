"""The grids: arms, claims, and the paper's figures (arXiv 2507.20999, LLaMA2-7B)."""

from __future__ import annotations

from lorapar_ray.ablations.grid import Arm, Claim, Grid

PLAIN = "sft.masked=false"
ONE_EPOCH, TWO_EPOCHS = "sft.epochs=1", "sft.epochs=2"
BOTH_STAGES = "order=[sft, grpo]"
UNMASKED = (PLAIN, "grpo.masked=false")
"""As the methods that LoRA-PAR is compared with: no scores, and no warm-up before them."""
EVERY_ELEMENT = ("partition.theta=1", "partition.alpha=1", "partition.beta=1")
"""A mask that keeps everything, where only the trained elements may differ: the same warm-up as with other masks."""
BOTH = "sft.systems=[1, 2]"
"""A method without RL trains on all questions."""

UNTRAINED = "13.3"
"""LLaMA2-7B on GSM8K."""


def _strategies() -> Grid:
    one = "label.quorum=1"
    return Grid(
        "strategies",
        "how the questions are split, with one, three and five teachers of the config (table 1)",
        (
            Arm("single", ("label.strategy=single", one), "25.32", teachers=1),
            Arm("single-role-play", ("label.strategy=single_roleplay", one), "26.23", teachers=1),
            Arm("second-role-play", ("label.strategy=single_roleplay", one), "26.84", teachers=1, after=1, needs=2),
            Arm("random", ("label.strategy=random",), "25.85"),
            Arm("vote", ("label.strategy=vote",), "27.07", teachers=3),
            Arm("vote-5", ("label.strategy=vote",), "27.60", teachers=5, needs=5),
        ),
        (
            Claim("voting beats one teacher", "vote", "single-role-play"),
            Claim("voting beats one teacher", "vote", "second-role-play"),
            Claim("five teachers beat three", "vote-5", "vote"),
            Claim("role-play beats none", "single-role-play", "single"),
            Claim("voted labels beat random ones", "vote", "random"),
        ),
        base=UNTRAINED,
    )


def _activation() -> Grid:
    paper = {
        (0, 0): "18.88/19.03",
        (0, 0.5): "18.12/25.25",
        (0, 1): "18.35/23.58",
        (0.5, 0): "23.65/25.85",
        (0.5, 0.5): "24.79/29.57",
        (0.5, 1): "24.94/31.01",
        (1, 0): "27.75/27.75",
        (1, 0.5): "26.99/31.92",
        (1, 1): "27.14/34.37",
    }
    arms = tuple(
        Arm(f"a{alpha:g}-b{beta:g}", (BOTH_STAGES, f"partition.alpha={alpha:g}", f"partition.beta={beta:g}"), figure)
        for (alpha, beta), figure in paper.items()
    )
    return Grid(
        "activation",
        "how much of the shared region each stage trains (table 2)",
        arms,
        tuple(Claim("α = β = 1 ends highest", "a1-b1", arm.name) for arm in arms if arm.name != "a1-b1"),
        base=UNTRAINED,
        stronger=tuple(
            Claim("RL after a stronger SFT stage ends higher", f"a1-b{beta}", f"a0-b{beta}")
            for beta in ("0", "0.5", "1")
        ),
    )


def _theta() -> Grid:
    paper = {
        "qkv": ("0", "1.44", "15.77", "18.44", "20.55", "22.29", "23.73", "23.65", "23.35", "26.46"),
        "gud": ("12.13", "6.90", "5.76", "6.22", "11.14", "17.36", "21.15", "22.14", "25.47", "30.25"),
        "qkvgud": ("8.87", "12.59", "11.90", "13.04", "13.12", "15.16", "20.62", "24.03", "27.3", "30.63"),
    }
    drawn = {
        "qkv": {0.3: "0", 0.6: "11.22", 0.9: "21.30"},
        "gud": {0.3: "3.11", 0.6: "17.13", 0.9: "23.43"},
        "qkvgud": {0.3: "6.29", 0.6: "13.87", 0.9: "23.43"},
    }
    arms, claims = [], []
    for targets, figures in paper.items():
        for place, figure in enumerate(figures):
            theta = (place + 1) / 10
            change = ("order=[sft]", "partition.alpha=1", f"adapter.targets={targets}", f"partition.theta={theta:g}")
            name = f"{targets}-{theta:g}"
            arms.append(Arm(name, change, figure))
            if theta in drawn[targets]:
                arms.append(Arm(f"{name}-random", (*change, "partition.mask=random"), drawn[targets][theta]))
                claims.append(Claim("the chosen subset beats a random one of its size", name, f"{name}-random"))
    claims.append(Claim("about 40 % of the elements reach the full adapter", "qkvgud-0.9", "qkvgud-1", reaches=True))
    help_ = "how much is kept, of which modules, against random (table 3)"
    return Grid("theta", help_, tuple(arms), tuple(claims), base=UNTRAINED)


def _methods() -> Grid:
    sft, pissa = (PLAIN, "order=[sft]", BOTH), "adapter.init=pissa"
    rl, par = (*UNMASKED, BOTH_STAGES, ONE_EPOCH), (BOTH_STAGES, ONE_EPOCH)
    return Grid(
        "methods",
        "LoRA-PAR against common methods: one or two epochs of SFT, or one of SFT and then RL (table 4)",
        (
            Arm("lora-1", (*sft, ONE_EPOCH), "27.8"),
            Arm("lora-2", (*sft, TWO_EPOCHS), "31.86"),
            Arm("lora-plus-2", (*sft, TWO_EPOCHS, "sft.lora_plus_ratio=8")),
            Arm("olora-1", (*sft, "adapter.init=olora", ONE_EPOCH), "29.57"),
            Arm("olora-2", (*sft, "adapter.init=olora", TWO_EPOCHS), "32.83"),
            Arm("pissa-1", (*sft, pissa, ONE_EPOCH), "30.78"),
            Arm("pissa-2", (*sft, pissa, TWO_EPOCHS), "33.59"),
            Arm("lora-rl", rl),
            Arm("pissa-rl", (*rl, pissa), "30.63/37.45"),
            Arm("lora-par", par, "27.07/34.57"),
            Arm("lora-par-pissa", (*par, pissa), "28.73/38.97"),
            Arm("lora-par-pissa-0.95", (*par, pissa, "partition.theta=0.95"), "30.86/41.85"),
        ),
        (
            Claim("LoRA-PAR ends above two epochs of LoRA", "lora-par", "lora-2"),
            Claim("LoRA-PAR ends above LoRA and RL without a mask", "lora-par", "lora-rl"),
            Claim("LoRA-PAR on PiSSA ends above PiSSA and RL", "lora-par-pissa", "pissa-rl"),
            Claim("θ = 0.95 ends above 0.9", "lora-par-pissa-0.95", "lora-par-pissa"),
        ),
        base=UNTRAINED,
    )


def _order() -> Grid:
    return Grid(
        "order",
        "which stage comes first",
        (
            Arm("sft-grpo", ("order=[sft, grpo]",), "81.65 (Qwen2.5-7B)"),
            Arm("grpo-sft", ("order=[grpo, sft]",), "68.46 (Qwen2.5-7B)"),
        ),
        (Claim("SFT before RL ends higher", "sft-grpo", "grpo-sft"),),
        base="21.91 (Qwen2.5-7B, no example)",
    )


def _peft() -> Grid:
    only = (PLAIN, "order=[sft]", BOTH)
    learnt = (
        *only,
        "sft.gradient_checkpointing=false",
        "sft.packing=false",
        "sft.sharding=none",
    )  # all they allow
    methods = {
        "prompt-tuning": ((*learnt, "adapter.method=prompt_tuning", "sft.learning_rate=0.03"), "22.37", "26.31"),
        "p-tuning": ((*learnt, "adapter.method=p_tuning", "sft.learning_rate=0.003"), "24.18", "26.76"),
        "prefix-tuning": ((*learnt, "adapter.method=prefix_tuning", "sft.learning_rate=0.03"), "25.7", "30.02"),
        "ia3": ((*learnt, "adapter.method=ia3", "sft.learning_rate=0.005"), "22.97", "26.46"),
        "qlora": ((*only, "model.quantization=nf4"), "", ""),
        "lora": (only, "27.8", "31.86"),
    }
    arms = [
        Arm(f"{name}-{number}", (*changes, epochs), figure)
        for name, (changes, *figures) in methods.items()
        for number, epochs, figure in zip((1, 2), (ONE_EPOCH, TWO_EPOCHS), figures, strict=True)
    ]
    return Grid(
        "peft",
        "other parameter-efficient methods, one and two epochs",
        tuple(arms),
        (
            Claim("LoRA ends above IA3 after one epoch", "lora-1", "ia3-1"),
            Claim("LoRA ends above IA3 after two epochs", "lora-2", "ia3-2"),
        ),
        base=UNTRAINED,
    )


def _stage1() -> Grid:
    only = ("order=[sft]",)
    pissa = "adapter.init=pissa"
    return Grid(
        "stage1",
        "which elements stage 1 trains, at one learning rate for all",
        (
            Arm("lora", (*only, *EVERY_ELEMENT)),
            Arm("lora-par", only),
            Arm("random-mask", (*only, "partition.mask=random")),
            Arm("pissa", (*only, PLAIN, pissa)),
            Arm("lora-par-pissa", (*only, pissa)),
            Arm("random-mask-pissa", (*only, pissa, "partition.mask=random")),
        ),
        (
            Claim("the mask beats a random one of its size", "lora-par", "random-mask"),
            Claim("the mask reaches the full LoRA", "lora-par", "lora", reaches=True),
            Claim("on PiSSA the mask beats training everything", "lora-par-pissa", "pissa"),
        ),
    )


def _mask() -> Grid:
    stage1 = ("order=[sft]", "partition.alpha=1")
    controls = {
        "random": ("partition.mask=random",),
        "magnitude": ("score.criterion=magnitude",),
        "first-order": ("score.criterion=taylor1",),
        "swapped": ("partition.mask=swapped",),
    }
    importance = Arm("importance", stage1)
    arms = (
        importance,
        *(Arm(name, (*stage1, *changes)) for name, changes in controls.items()),
        Arm("shuffled-labels", (*stage1, "label.shuffled=true"), votes=True),
        Arm("smaller-lora", (*stage1, "partition.theta=1"), as_large_as=importance),
        Arm("full-lora", (*stage1, "partition.theta=1")),
    )
    said = {
        "random": "the importance mask beats a random one of its size",
        "magnitude": "second-order importance beats magnitude at the same θ",
        "first-order": "second-order importance beats first-order at the same θ",
        "shuffled-labels": "voted labels beat the same labels shuffled",
        "swapped": "a stage's own mask beats the other System's",
        "smaller-lora": "the mask beats a LoRA of lower rank with about as many parameters",
        "full-lora": "the mask reaches the full LoRA",
    }
    return Grid(
        "mask",
        "stage 1 by mask",
        arms,
        tuple(Claim(text, "importance", name, reaches=name == "full-lora") for name, text in said.items()),
        tuned=True,
        free=("partition.theta",),
        moved=(Claim("the importance mask holds what training moves most", "importance", "full-lora"),),
    )


RETAINED = {
    "disjoint": ("partition.alpha=0", "partition.beta=0"),
    "shared": ("partition.alpha=1", "partition.beta=1"),
    "random": ("partition.alpha=0", "partition.beta=0", "partition.mask=random"),
    "unmasked": EVERY_ELEMENT,
}
"""Lines of a retention grid. Disjoint regions are the elements that only System 1 or only System 2 has."""
SECOND_RATES = (0.5, 1.0, 2.0)


def _retention(name: str, order: str, help_: str) -> Grid:
    arms = tuple(
        Arm(f"{line}-{rate:g}", (f"order={order}", *changes), second_rate=rate, line=line)
        for line, changes in RETAINED.items()
        for rate in SECOND_RATES
    )
    lines = (
        Claim("disjoint regions keep more than training every element", "disjoint", "unmasked"),
        Claim("disjoint regions keep more than random ones", "disjoint", "random"),
        Claim("disjoint regions keep more than shared ones", "disjoint", "shared"),
    )
    return Grid(name, help_, arms, lines=lines)


_RETENTION = (
    _retention("retention", "[sft, grpo]", "how much stage 2 loses of stage 1's skill, at equal gain in its own"),
    _retention("retention-reversed", "[grpo, sft]", "how much stage 1 loses of stage 2's skill, if it comes second"),
)


def _systems() -> Grid:
    regions = {
        "disjoint": ("partition.regions=disjoint",),
        "random": ("partition.regions=disjoint", "partition.mask=random"),
        "shared": ("partition.regions=own",),
        "unmasked": ("partition.regions=own", "partition.theta=1"),
    }
    arms = (
        Arm(name, ("order=[sft]", "sft.masked=true", "sft.sequence=true", *changes))
        for name, changes in regions.items()
    )
    return Grid(
        "systems",
        "any number of Systems trained one after the other, and what the earlier ones lose",
        tuple(arms),
        (
            Claim("disjoint regions end higher than training every element", "disjoint", "unmasked"),
            Claim("disjoint regions end higher than random ones of their sizes", "disjoint", "random"),
        ),
        free=("partition.theta",),
        sequence=(
            Claim("disjoint regions forget less than training every element", "disjoint", "unmasked"),
            Claim("disjoint regions forget less than random ones of their sizes", "disjoint", "random"),
            Claim("disjoint regions forget less than regions that overlap", "disjoint", "shared"),
        ),
    )


_ALL = (
    *(_strategies(), _activation(), _theta(), _methods(), _order(), _peft(), _stage1(), _mask(), *_RETENTION),
    _systems(),
)
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _ALL}
