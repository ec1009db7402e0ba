"""Replays a zoo of recorded gradients through `orthrus replay` and judges the weights by the oracle.

For every case: the same bits on every number of ranks (where `reproducible` promises it) and run to run,
an error ||W - W_ref|| / ||W_ref - W_0|| within its bound, exactly decayed weights under a zero gradient,
the optimizer state, and the bytes and messages `orthrus plan` announces. Rounded weights are judged step
by step: codes, scales, and the momentum that what was lost went into. Prints a table; exits 1 when
anything is violated.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

import oracle

STEPS = 5
CONTRIBUTIONS = 8
PHI_STEPS = 40

# --- the zoo --------------------------------------------------------------------------------------------
#
# A builder returns gradients[step][contribution], and says how well-conditioned its matrices are: a bf16
# iteration (and every table that is steep at 1) is only held to the tight bound on `gaussian` ones.


def _all(build):
    def gradients(rng, steps, count):
        return [[build(rng).astype(np.float32) for _ in range(count)] for _ in range(steps)]

    return gradients


def gaussian(*shape, scale=1.0):
    return shape, "gaussian", _all(lambda rng: scale * rng.standard_normal(shape))


def ill(*shape, scale=1.0):
    """Gaussian, but square or of rank one: its smallest or only singular value is where p is steep."""
    return shape, "ill", _all(lambda rng: scale * rng.standard_normal(shape))


def rank_deficient(rows, cols, rank):
    """One column and one row space for all steps, so that the momentum is rank-deficient too."""
    fixed = np.random.default_rng(11)
    left, right = fixed.standard_normal((rows, rank)), fixed.standard_normal((rank, cols))
    build = _all(lambda rng: left @ rng.standard_normal((rank, rank)) @ right)
    return (rows, cols), "ill", build


def condition_1e8(rows, cols):
    fixed = np.random.default_rng(12)
    k = min(rows, cols)
    left, _ = np.linalg.qr(fixed.standard_normal((rows, k)))
    right, _ = np.linalg.qr(fixed.standard_normal((cols, k)))
    sigma = np.geomspace(1, 1e-8, k)
    build = _all(lambda rng: (left * (sigma * (1 + 0.2 * rng.standard_normal(k)))) @ right.T)
    return (rows, cols), "ill", build


def one_sign(*shape):
    """Every entry keeps its sign and its distance from 0 for all steps: sign(X) then depends on no
    rounding, though sign is not continuous."""
    signs = np.sign(np.random.default_rng(13).standard_normal(shape))
    return shape, "gaussian", _all(lambda rng: signs * (0.1 + np.abs(rng.standard_normal(shape))))


def zero(*shape):
    return shape, "zero", _all(lambda rng: np.zeros(shape))


MATRICES = {
    "wide": gaussian(23, 41),
    "tall": gaussian(41, 23),
    "square": ill(32, 32),
    "gaussian": gaussian(24, 64),
    "rank12": rank_deficient(24, 36, 12),
    "row": ill(1, 37),
    "column": ill(29, 1),
    "cond1e8": condition_1e8(24, 32),
    "qkv": gaussian(48, 40),
    "conv": gaussian(8, 4, 3, 3),
    "zero": zero(16, 24),
}
EXTREMES_OF_12 = {"e-30": gaussian(12, 31, scale=1e-30), "e+30": gaussian(12, 31, scale=1e30)}
EXTREMES = {"e-30": gaussian(20, 31, scale=1e-30), "e+30": gaussian(20, 31, scale=1e30)}
# Where singular values are zero, rounding X to bf16 leaves 2^-9 ||X|| / sqrt(3), which p amplifies up to a
# thousandfold: of rank 5 in 24 rows, that alone is 0.4 of the update, so it is an f32 case.
DEEP = {"rank5": rank_deficient(24, 36, 5)}
VECTORS = {"bias": gaussian(33), "zero_bias": zero(7)}

# --- cases ----------------------------------------------------------------------------------------------

# lr * weight_decay = 1/16 exactly, and the weights under a zero gradient have 4 bits: five steps of decay,
# 15^5, fit into the 24 bits of f32, so "exactly the decayed weights" has one answer, however it is computed.
DECAYED = {"lr": 0.125, "weight_decay": 0.5}
AUXILIARY = {"match": "*", "rule": {"name": "adamw", **DECAYED}}


class Case:
    def __init__(self, name, groups, zoo, ranks, **options):
        """@param zoo  {parameter name: zoo entry}; `ranks` = [] means the full list."""
        self.name, self.groups, self.zoo, self.ranks = name, groups, zoo, ranks
        self.virtual_shards = options.get("virtual_shards", CONTRIBUTIONS)
        self.contributions = options.get("contributions", CONTRIBUTIONS)
        self.steps = options.get("steps", STEPS)
        self.bad_step = options.get("bad_step")
        self.head = options.get("head", {})
        self.bf16_files = options.get("bf16_files", ())
        # Recorded with the numbers of `like`; the same bits as the case `same_bits_as`, run before.
        self.like = options.get("like", name)
        self.same_bits_as = options.get("same_bits_as")
        self.judged_as = options.get("judged_as", "weights")
        # Rules without which there is nothing to judge, yet.
        self.rules = {g["rule"]["name"] for g in groups}
        self.far = options.get("far", 1.0)  # the beginning lies so many times the updates' length away


def _variant(prefix, zoo):
    return {f"{prefix}.{name}.weight": entry for name, entry in zoo.items()}


def _matrix_groups(prefix, rule, lmo, **rest):
    """The fused weight is three matrices; the rest of the variant is what it looks like."""
    group = {"rule": {**DECAYED, **rule}, "lmo": lmo, **rest}
    return [
        {"match": f"{prefix}.qkv.*", **group, "split": {"rows": 3}},
        {"match": f"{prefix}.*", **group},
    ]


def muon_case(dtype):
    groups, zoo = [], {}
    for nesterov, form, scale in itertools.product(
        (True, False), ("ema", "heavy_ball"), ("original", "match_rms_adamw", "rms_to_rms")
    ):
        prefix = f"{'nesterov' if nesterov else 'plain'}.{form}.{scale}"
        rule = {"name": "muon", "momentum": 0.9, "nesterov": nesterov, "momentum_form": form}
        groups += _matrix_groups(prefix, rule, {"dtype": dtype, "scale": scale})
        deep = DEEP if dtype == "f32" else {}
        zoo.update(_variant(prefix, {**MATRICES, **EXTREMES, **deep}))
        zoo[f"{prefix}.bias"] = VECTORS["bias"]
    return Case(f"muon-{dtype}", groups + [AUXILIARY], zoo, [], head={"bucket": "16KiB"})


def normuon_case():
    groups, zoo = [], {}
    for dtype, nesterov in itertools.product(("f32", "bf16"), (True, False)):
        prefix = f"normuon.{dtype}.{'nesterov' if nesterov else 'plain'}"
        rule = {"name": "normuon", "momentum": 0.9, "nesterov": nesterov, "beta2": 0.9}
        groups += _matrix_groups(prefix, rule, {"dtype": dtype})
        zoo.update(_variant(prefix, {**MATRICES, **EXTREMES}))
    rule = {"name": "normuon", "momentum_form": "heavy_ball", "axis": "long", "eps": 1e-3}
    groups += _matrix_groups("normuon.long", rule, {"scale": "match_rms_adamw"})
    zoo.update(_variant("normuon.long", MATRICES))
    return Case("normuon", groups, zoo, [], head={"bucket": "8KiB"})


def elementwise_case():
    groups, zoo = [], {}
    small = {k: MATRICES[k] for k in ("wide", "column", "conv", "zero")}
    for placement in ("torch", "moonlight"):
        prefix = f"adamw.{placement}"
        rule = {"name": "adamw", **DECAYED, "betas": [0.9, 0.95], "eps_placement": placement}
        groups.append({"match": f"{prefix}.e*", "rule": {**rule, "eps": 1e-22}})
        groups.append({"match": f"{prefix}.*", "rule": {**rule, "eps": 1e-3}})
        zoo.update(_variant(prefix, {**small, **VECTORS}))
        zoo[f"{prefix}.e-15"] = gaussian(9, 14, scale=1e-15)
        zoo[f"{prefix}.e+15"] = gaussian(9, 14, scale=1e15)
    for nesterov, form in itertools.product((True, False), ("heavy_ball", "ema")):
        prefix = f"sgd.{'nesterov' if nesterov else 'plain'}.{form}"
        rule = {"name": "sgd", **DECAYED, "momentum": 0.8, "nesterov": nesterov}
        groups.append({"match": f"{prefix}.*", "rule": {**rule, "momentum_form": form}})
        zoo.update(_variant(prefix, {**small, **VECTORS}))
    return Case("elementwise", groups, zoo, [], head={"bucket": "2KiB"})


def lion_case():
    rule = {"name": "lion", **DECAYED, "betas": [0.9, 0.99]}
    zoo = {"lion.weight": one_sign(17, 9), "lion.bias": one_sign(21), "lion.zero": zero(4, 5)}
    return Case("lion", [{"match": "*", "rule": rule}], zoo, [1, 3, 7])


def table_case():
    """Every coefficient table and every norm, on matrices where none of them is steep."""
    groups, zoo = [], {}
    shapes = {k: MATRICES[k] for k in ("wide", "tall", "gaussian", "zero")}
    for table, (polynomials, _) in oracle.TABLES.items():
        count = max(5, len(polynomials)) if table in ("eco8", "torch_pe10", "dsv4_10") else 5
        lmo = {"coefficients": table, "iterations": 10 if table == "dsv4_10" else count}
        groups.append({"match": f"table.{table}.*", "rule": {"name": "muon", **DECAYED}, "lmo": lmo})
        zoo.update(_variant(f"table.{table}", shapes))
    for norm in ("frobenius", "row", "column", "sign"):
        group = {"rule": {"name": "muon", **DECAYED}, "lmo": {"norm": norm, "scale": "spectral"}}
        groups.append({"match": f"norm.{norm}.*", **group})
        signs = {"wide": one_sign(23, 41), "zero": zero(5, 6)}
        zoo.update(_variant(f"norm.{norm}", signs if norm == "sign" else shapes))
    for mode in ("add", "clamp"):
        lmo = {"coefficients": "jordan", "eps_mode": mode, "eps": 0.25}
        groups.append({"match": f"eps.{mode}.*", "rule": {"name": "muon", **DECAYED}, "lmo": lmo})
        zoo.update(_variant(f"eps.{mode}", {"wide": gaussian(12, 20), "small": gaussian(12, 20, scale=0.02)}))
    return Case("tables-norms", groups, zoo, [1, 3])


def stored_bf16_case():
    """Weights that rest in bf16, with and without f32 ones beside."""
    groups, zoo = [], {}
    shapes = {k: MATRICES[k] for k in ("wide", "tall", "qkv")}
    for residual, rounding in (("none", "nearest"), ("master", "nearest"), ("none", "stochastic")):
        prefix = f"stored.{residual}.{rounding}"
        weights = {"weights": {"format": "bf16", "residual": residual, "rounding": rounding}}
        groups += _matrix_groups(prefix, {"name": "muon"}, {}, **weights)
        groups.append({"match": f"flat.{residual}.{rounding}.*", "rule": AUXILIARY["rule"], **weights})
        zoo.update(_variant(prefix, shapes))
        flat = {"wide": MATRICES["wide"], "bias": VECTORS["bias"]}
        zoo.update(_variant(f"flat.{residual}.{rounding}", flat))
    files = [n for n in zoo if "tall" in n or "bias" in n]
    return Case("stored-bf16", groups, zoo, [1, 2, 3], bf16_files=files)


# Where the pieces of matrices meet: the first three modes promise the bits of one rank, and so of each
# other. NorMuon needs the norm of whole rows: not where iterations leave only pieces.
BITWISE = ("owner", "exchange", "gather")


def mode_case(mode, **matrix):
    groups, zoo = [], {}
    for rule in ("muon", "normuon"):
        place = {"mode": mode, **matrix}
        # Tall matrices are cut into rows: their Gram matrices have the columns' norms.
        if rule == "normuon" and mode not in BITWISE:
            place = {"mode": "exchange"}
        rules = {"name": rule, "momentum": 0.9}
        groups += _matrix_groups(rule, rules, {"scale": "match_rms_adamw"}, matrix=place)
        deep = {} if matrix.get("wire") == "bf16" else DEEP
        zoo.update(_variant(rule, MATRICES if rule == "normuon" else {**MATRICES, **EXTREMES, **deep}))
    zoo["bias"] = VECTORS["bias"]
    name = f"mode-{mode}" + "".join(f"-{v}" for k, v in matrix.items() if k == "wire")
    options = {"like": "mode-owner", "head": {"bucket": "4KiB"}}
    if mode not in BITWISE or matrix.get("wire") == "bf16":
        options["virtual_shards"] = 0
    elif mode != "owner":
        options["same_bits_as"] = "mode-owner"
    return Case(name, groups + [AUXILIARY], zoo, [1, 3, 4] if mode == "gram" else [1, 3], **options)


# `deep`: what is damped by a share of the norm, and what goes through a Gram matrix in f32, has other zeros.
FAMILY = {
    "short": {"name": "prism"},
    "long": {"name": "prism", "side": "long", "gamma": 0.5},
    "left": {"name": "prism", "side": "left", "gamma": 3.0},
    "right": {"name": "prism", "side": "right", "damp_first_step": False},
    "both": {"name": "bidirectional_prism"},
    "uneven": {"name": "bidirectional_prism", "gamma_left": 0.5, "gamma_right": 2.0, "eps": 1e-3}
    | {"damp_first_step": False},
    "left_only": {"name": "bidirectional_prism", "gamma_right": 0.0},
}


def family_case(mode=None):
    """PRISM of every side and Bidirectional-PRISM; matrices in `mode`."""
    groups, zoo = [], {}
    place = {"matrix": {"mode": mode}} if mode else {}
    shared = mode in ("gram_steps", "block_cyclic")  # iterations that ranks share, in f32
    for variant, rule in FAMILY.items():
        if shared and rule["name"] != "prism":
            continue
        shapes = {**MATRICES, **EXTREMES, **DEEP}
        lmo = {"scale": "match_rms_adamw" if variant == "long" else "original"}
        groups += _matrix_groups(variant, {"momentum": 0.9, **rule}, lmo, **place)
        zoo.update(_variant(variant, shapes))
    for side in () if shared else ("short", "long"):
        rule = {"name": "prism", "momentum": 0.9, "side": side}
        groups += _matrix_groups(f"bf16.{side}", rule, {"dtype": "bf16"}, **place)
        zoo.update(_variant(f"bf16.{side}", MATRICES))
    zoo["bias"] = VECTORS["bias"]
    options = {"like": "family", "head": {"bucket": "8KiB"}}
    if shared or mode == "gram":
        options["virtual_shards"] = 0
    elif mode:
        options["same_bits_as"] = "family"
    return Case(f"family-{mode}" if mode else "family", groups + [AUXILIARY], zoo, [1, 3], **options)


def separated(rows, cols, turning=False):
    """Singular values a factor of 1.2 apart in two bases that stay: f32 knows every eigenvector of a
    factor. `turning`: in every other step the largest is the smallest, and each step outweighs all
    before, so that the vectors' order turns over."""
    fixed = np.random.default_rng(14)
    k = min(rows, cols)
    left, _ = np.linalg.qr(fixed.standard_normal((rows, k)))
    right, _ = np.linalg.qr(fixed.standard_normal((cols, k)))
    sigma = np.geomspace(1, 1.2 ** (1 - k), k) * np.sqrt(k)

    def one(rng, t):
        noise = 0.02 * rng.standard_normal((rows, cols))
        size, order = (4.0**t, (-1) ** t) if turning else (1, 1)
        g = (left * (sigma[::order] * (1 + 0.05 * rng.standard_normal(k)))) @ right.T + noise
        return (size * g).astype(np.float32)

    def gradients(rng, steps, count):
        return [[one(rng, t) for _ in range(count)] for t in range(steps)]

    return (rows, cols), "gaussian", gradients


# A factor is a sum of squares in f32: its gradients may be 1e-15 to 1e15 or so.
SQUARED = {"e-12": gaussian(20, 31, scale=1e-12), "e+12": gaussian(20, 31, scale=1e12)}
KRONECKER = {
    "shampoo.plain": {"name": "shampoo", "momentum": 0.9, "frequency": 1},
    "shampoo.sums": {"name": "shampoo", "beta2": 1.0, "bias_correction": False, "eps": 1e-4},
    "shampoo.half": {"name": "shampoo", "exponent": 0.5, "eps": 1e-2, "trace_scaling": True},
    "shampoo.third": {"name": "shampoo", "exponent": 0.3, "trace_scaling": True, "eps": 1e-3},
    "shampoo.grafted": {"name": "shampoo", "grafting": "adam", "grafting_eps": 1e-3},
    "one_sided.plain": {"name": "one_sided_shampoo", "momentum": 0.9, "frequency": 1},
    "one_sided.sums": {"name": "one_sided_shampoo", "beta2": 1.0, "eps": 1e-3, "bias_correction": True},
    "kl.plain": {"name": "kl_shampoo", "momentum": 0.9, "frequency": 1},
    "kl.corrected": {"name": "kl_shampoo", "beta2": 0.8, "bias_correction": True},
}


def _lmo_of(rule):
    """Of the Kronecker family one-sided Shampoo's direction alone is scaled."""
    return {"scale": "match_rms_adamw"} if rule["name"] in ("one_sided_shampoo", *oracle.PRISM_RULES) else {}


def kronecker_case(mode=None):
    """Shampoo on both sides, on one, by KL; SOAP where its vectors are no matter of rounding."""
    groups, zoo = [], {}
    place = {"matrix": {"mode": mode}} if mode else {}
    pieces = mode in ("gram", "block_cyclic")
    for variant, rule in KRONECKER.items():
        if pieces and rule["name"] != "one_sided_shampoo":
            continue
        if mode == "block_cyclic" and variant != "one_sided.sums":
            continue  # its eps is above what the grid damps by
        groups += _matrix_groups(variant, rule, _lmo_of(rule), **place)
        zoo.update(_variant(variant, MATRICES))
        if variant.endswith(".plain"):
            groups.append({**groups[-1], "match": f"scaled.{variant}.*"})
            zoo.update(_variant(f"scaled.{variant}", SQUARED))
    # Renewed in steps 1, 2 and 4: the first matrix of its shape. Its factors have all directions by then.
    seldom = ("one_sided_shampoo", "shampoo", "kl_shampoo")
    for i, name in enumerate(() if mode == "block_cyclic" else seldom[: 1 if pieces else 3]):
        rule = {**DECAYED, "name": name, "frequency": 2}
        groups.append({"match": f"seldom.{name}.*", "rule": rule, **place})
        zoo[f"seldom.{name}.weight"] = gaussian(15 + i, 17 + i)
    # Where an entry is 0 but for rounding, Adam's step is one of any sign, unless eps is above rounding.
    for variant, rest, shapes in (
        ("both", {}, {"square": separated(14, 14), "almost": separated(13, 14)}),
        ("turning", {}, {"square": separated(9, 9, turning=True)}),
        ("seldom", {"frequency": 2}, {"square": separated(11, 11)}),
        ("one", {"max_dimension": 16}, {"wide": separated(12, 33), "tall": separated(33, 12)}),
        ("none", {"max_dimension": 8}, {"wide": gaussian(12, 34), "conv": MATRICES["conv"]}),
    ):
        if pieces:
            break
        rule = {**DECAYED, "name": "soap", "eps": 0.1, **rest}
        groups.append({"match": f"soap.{variant}.*", "rule": rule, **place})
        zoo.update(_variant(f"soap.{variant}", shapes))
    options = {"like": "kronecker", "head": {"bucket": "8KiB"}}
    if pieces:
        options["virtual_shards"] = 0
    elif mode:
        options["same_bits_as"] = "kronecker"
    name = f"kronecker-{mode}" if mode else "kronecker"
    return Case(name, groups + [AUXILIARY], zoo, [1, 3], **options)


# Of at most 12 lines: there the oracle knows what the largest singular value is divided by.
SHORT = {
    "wide": gaussian(11, 40),
    "tall": gaussian(37, 12),
    "square": ill(9, 9),
    "rank4": rank_deficient(10, 36, 4),
    "row": ill(1, 37),
    "column": ill(29, 1),
    "cond1e8": condition_1e8(8, 32),
    "qkv": gaussian(30, 24),
    "zero": zero(6, 24),
}


def rational_case(mode=None):
    groups, zoo = [], {}
    for terms, dtype in ((2, "f32"), (3, "f32"), (4, "f32"), (2, "bf16")):
        prefix = f"terms{terms}.{dtype}"
        lmo = {"coefficients": "rational", "terms": terms, "dtype": dtype}
        place = {"matrix": {"mode": mode}} if mode else {}
        groups += _matrix_groups(prefix, {"name": "muon", "momentum": 0.9}, lmo, **place)
        zoo.update(_variant(prefix, {**SHORT, **EXTREMES_OF_12} if dtype == "f32" else SHORT))
    name = f"rational-{mode}" if mode else "rational"
    options = {"like": "rational", "head": {"bucket": "4KiB"}, "virtual_shards": 0 if mode else CONTRIBUTIONS}
    return Case(name, groups, zoo, [1, 3, 4] if mode else [], **options)


# lr * weight_decay = 1/64: a momentum of 0.95 must not outlive the weights, or nothing comes back.
SLOW = {"lr": 0.125, "weight_decay": 0.125}
WARM = {"schedule": {"kind": "constant", "warmup_steps": 8}}
COSINE = {"schedule": {"kind": "cosine", "decay_steps": 6, "final": 0.2}}
FORMATS = {
    "e4m3.row": {"format": "fp8_e4m3"},
    "e5m2.block.pow2": {"format": "fp8_e5m2", "block": 16, "scale_format": "pow2"},
    "int8.block": {"format": "int8", "block": 8},
    "int4.row": {"format": "int4"},
    "int4.block.pow2": {"format": "int4", "block": 4, "scale_format": "pow2"},
    "bf16": {"format": "bf16"},
}


def quantized_case(mode=None):
    """Every rule that feeds back with every format, and what else may become of a residual; matrices in `mode`."""
    # 36 and 44: blocks of 16 leave a rest, those of 4 do not, as int4 wants it; 25 is odd.
    flat = {"wide": gaussian(23, 44), "bias": gaussian(36), "conv": MATRICES["conv"]}
    matrices = {"wide": gaussian(23, 44), "tall": gaussian(44, 20)}
    signs = {"wide": one_sign(23, 44), "bias": one_sign(36)}
    ahead = {"nesterov": True, "momentum_form": "ema", "momentum": 0.8}
    plain = {"nesterov": False, "momentum_form": "heavy_ball", "momentum": 0.8}
    # The eps: below 1/10 of a gradient, what 8 contributions leave of each other would be divided by less.
    rules = {
        "sgd": ({"name": "sgd", "momentum": 0.9}, flat, {}),
        "adamw": ({"name": "adamw", "eps": 0.1}, flat, {}),
        "lion": ({"name": "lion", "betas": [0.9, 0.95]}, signs, {}),
        "muon": ({"name": "muon", "momentum": 0.9}, matrices, {}),
        "sgd.ahead": ({"name": "sgd", **ahead}, flat, {}),
        "adamw.warm": ({"name": "adamw", "eps": 0.1, "eps_placement": "moonlight"}, flat, WARM),
        "muon.plain": ({"name": "muon", **plain}, matrices, WARM),
    }
    groups, zoo = [], {}

    def add(variant, entries, shapes, rest, **weights):
        group = {"rule": {**SLOW, **entries}, "weights": weights, **rest}
        if entries["name"] == "muon":
            group["lmo"] = {"scale": "match_rms_adamw"}
            group["matrix"] = {"mode": mode} if mode else {}
        groups.append({"match": f"{variant}.*", **group})
        zoo.update(_variant(variant, shapes))

    for (i, (rule, row)), (j, (name, weights)) in itertools.product(
        enumerate(rules.items()), enumerate(FORMATS.items())
    ):
        rounding = ("nearest", "stochastic")[(i + j) % 2]  # every rule and every format meets both
        add(f"{rule}.{name}", *row, **weights, rounding=rounding, residual="momentum")
    for rule in ("sgd", "adamw", "lion", "muon"):
        for residual in ("none", "master"):
            add(f"{rule}.int8.{residual}", *rules[rule], format="int8", scale="tensor", residual=residual)
        for name, eco in (
            ("unguarded", {"max_rel_correction": 0}),
            ("guarded", {"max_rel_correction": 0.01}),
            ("blog", {"kappa": "blog"}),
            ("paper", {"kappa": "paper"}),
        ):
            entries, shapes, rest = rules[rule]
            add(f"{rule}.{name}", entries, shapes, rest, format="int4", residual="momentum", eco=eco)
        # A momentum as short as this takes more of E than the guard lets pass, if there is one unasked.
        short = {"betas": [0.9, 0.3]} if rule in ("adamw", "lion") else {"momentum": 0.3}
        add(f"{rule}.short", {**entries, **short}, shapes, rest, format="int4", residual="momentum")
        eco = {"format": "int4", "residual": "momentum", "eco": {"kappa": "exact_schedule"}}
        add(f"{rule}.planned", entries, shapes, COSINE, **eco)
        # Larger than what element-wise rules leave on one rank: rows of one parameter on several.
        large = {"large": one_sign(130, 96) if rule == "lion" else gaussian(130, 96)}
        eco = {"format": "fp8_e4m3", "block": 32, "rounding": "stochastic", "residual": "momentum"}
        add(f"{rule}.cut", entries, large, rest, **eco, eco={"max_rel_correction": 0.01})
    eco = {"format": "fp8_e4m3", "rounding": "stochastic", "residual": "momentum"}
    add("rows", {"name": "muon"}, {"qkv": MATRICES["qkv"]}, {"split": {"rows": 3}}, **eco)
    add("cols", {"name": "muon"}, {"wide": gaussian(18, 40)}, {"split": {"cols": [24, 16]}}, **eco, block=8)
    odd = {"tall": gaussian(30, 25), "zero": zero(5, 7)}
    add("odd", {"name": "sgd"}, odd, {}, **{**eco, "format": "int4"})
    options = {"steps": 3, "judged_as": "codes", "far": 4.0, "head": {"bucket": "64KiB", "train_steps": 3}}
    if mode:  # scales and errors of pieces on several ranks: the bits of whole matrices
        bits = {"like": "quantized", "same_bits_as": "quantized"}
        return Case(f"quantized-{mode}", groups, zoo, [1, 3], **options, **bits)
    return Case("quantized", groups, zoo, [1, 2, 3, 4], **options)


def quantized_family_case(kronecker):
    """What rounding takes, through the roots of PRISM or of the Kronecker family."""
    matrices = {"wide": gaussian(23, 44), "tall": gaussian(44, 20)}
    turned = {"wide": separated(12, 36), "square": separated(12, 12)}
    rules = [
        ({"name": "prism", "momentum": 0.9}, matrices),
        ({"name": "prism", "momentum": 0.8, "side": "long", "gamma": 0.5}, matrices),
        ({"name": "bidirectional_prism", "momentum": 0.9, "eps": 1e-3}, matrices),
        ({"name": "bidirectional_prism", "momentum": 0.8, "damp_first_step": False}, matrices),
    ]
    if kronecker:
        rules = [
            ({"name": "shampoo", "eps": 0.1}, matrices),
            ({"name": "shampoo", "eps": 0.1, "grafting": "adam", "grafting_eps": 0.1}, matrices),
            ({"name": "one_sided_shampoo", "momentum": 0.9}, matrices),
            ({"name": "kl_shampoo"}, matrices),
            ({"name": "soap", "eps": 0.1, "max_dimension": 16}, turned),
        ]
    formats = [
        {"format": "fp8_e4m3", "rounding": "stochastic"},
        {"format": "int4", "block": 4, "scale_format": "pow2"},
        {"format": "bf16"},
    ]
    groups, zoo = [], {}
    for (i, (rule, shapes)), (j, weights) in itertools.product(enumerate(rules), enumerate(formats)):
        weights = {**weights, "residual": "momentum"}
        if (i + j) % 2:
            weights["eco"] = {"max_rel_correction": 0.01}
        variant = f"{rule['name']}{i}.{weights['format']}"
        group = {"rule": {**SLOW, **rule}, "weights": weights, "lmo": _lmo_of(rule)}
        groups.append({"match": f"{variant}.*", **group})
        zoo.update(_variant(variant, shapes))
    options = {"steps": 3, "judged_as": "codes", "far": 4.0, "head": {"train_steps": 3}}
    return Case(f"quantized-{'kronecker' if kronecker else 'family'}", groups, zoo, [1, 3], **options)


def momentum_case(rests):
    """Every rule with a momentum that rests in fewer bits than it is updated in."""
    # Rows of less than a block, of several and a rest; one tensor that several ranks have rows of.
    flat = {"wide": gaussian(23, 44), "bias": gaussian(36), "large": gaussian(130, 96), "zero": zero(5, 7)}
    matrices = {"wide": gaussian(23, 77), "tall": gaussian(44, 20), "conv": MATRICES["conv"]}
    rules = {
        "sgd": ({"name": "sgd", "momentum": 0.9, "nesterov": True}, flat),
        "adamw": ({"name": "adamw", "eps": 0.1}, flat),
        "lion": ({"name": "lion", "betas": [0.9, 0.95]}, {"wide": one_sign(23, 44), "bias": one_sign(36)}),
        "muon": ({"name": "muon", "momentum": 0.9}, matrices),
        "normuon": ({"name": "normuon", "momentum": 0.9, "nesterov": False}, matrices),
    }
    groups, zoo = [], {}
    for name, (rule, shapes) in rules.items():
        groups.append({"match": f"{name}.*", "rule": {**SLOW, **rule}, "state": rests})
        zoo.update(_variant(name, shapes))
    options = {"steps": 4, "judged_as": "momentum", "head": {"bucket": "64KiB"}}
    return Case(f"momentum-{rests['momentum']}", groups, zoo, [1, 2, 3], **options)


def phi_case():
    """SGD for many steps: W - sM at the end is that of a run without rounding, whatever the quantizer."""
    cosine = {"schedule": {"kind": "cosine", "decay_steps": PHI_STEPS, "final": 0.2}}
    kinds = {
        "exact": ("exact", {}),
        "schedule": ("exact_schedule", cosine),
        # These must miss it.
        "not-blog": ("blog", {}),
        "not-exact": ("exact", cosine),
    }
    groups, zoo = [], {}
    for (label, (kind, rest)), nesterov in itertools.product(kinds.items(), (True, False)):
        for name, weights in FORMATS.items():
            variant = f"{label}.{'nesterov' if nesterov else 'plain'}.{name}"
            rule = {"name": "sgd", **SLOW, "momentum": 0.9, "momentum_form": "ema", "nesterov": nesterov}
            rounding = "nearest" if nesterov else "stochastic"
            eco = {**weights, "rounding": rounding, "residual": "momentum", "eco": {"kappa": kind}}
            groups.append({"match": f"{variant}.*", "rule": rule, "weights": eco, **rest})
            zoo[f"{variant}.weight"] = gaussian(12, 24)
    options = {"steps": PHI_STEPS, "contributions": 0, "virtual_shards": 0, "judged_as": "phi"}
    return Case("quantized-phi", groups, zoo, [2], head={"train_steps": PHI_STEPS}, **options)


def plain_zoo():
    groups = _matrix_groups("m", {"name": "muon"}, {}) + [AUXILIARY]
    return groups, {**_variant("m", MATRICES), **{f"v.{k}": v for k, v in VECTORS.items()}}


def all_cases():
    groups, zoo = plain_zoo()
    clipped = [{**g, "clip_norm": 0.5} if g["match"] == "*" else g for g in groups]
    large = {"m.large.weight": gaussian(192, 320), "m.larger.weight": gaussian(300, 130)}
    return [
        muon_case("f32"),
        muon_case("bf16"),
        normuon_case(),
        elementwise_case(),
        lion_case(),
        table_case(),
        stored_bf16_case(),
        *[mode_case(mode) for mode in (*BITWISE, "gram", "gram_steps", "block_cyclic")],
        mode_case("exchange", wire="bf16", accuracy="fast"),
        rational_case(),
        rational_case("gram"),
        family_case(),
        *[family_case(mode) for mode in ("exchange", "gather", "gram", "gram_steps", "block_cyclic")],
        kronecker_case(),
        *[kronecker_case(mode) for mode in ("exchange", "gather", "gram", "block_cyclic")],
        # Ranks that hold state but contribute no gradient.
        Case("few-shards", groups, zoo, [1, 2, 5], virtual_shards=4, contributions=4),
        # Without `reproducible`: uneven runs of contributions per rank, D1 only.
        Case("free-order", groups, {**zoo, **large}, [1, 2, 3], virtual_shards=0),
        Case("one-gradient", groups, zoo, [1, 3], virtual_shards=0, contributions=0),
        Case("clipped", clipped, zoo, [1, 3]),
        # One non-finite entry of one contribution: nobody moves in that step.
        Case("bad-step", groups, zoo, [1, 3], bad_step=2),
        quantized_case(),
        quantized_case("exchange"),
        quantized_case("gather"),
        quantized_family_case(kronecker=False),
        quantized_family_case(kronecker=True),
        phi_case(),
        momentum_case({"momentum": "bf16"}),
        momentum_case({"momentum": "int8", "block": 32}),
    ]


# --- recording ------------------------------------------------------------------------------------------


def yaml_text(case, stage=None):
    def flow(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {flow(v)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(flow(v) for v in value) + "]"
        if isinstance(value, bool):
            return "true" if value else "false"
        return repr(value) if isinstance(value, (int, float)) else value

    lines = ["schema: 1"]
    if "bucket" in case.head:
        lines.append(f"comm: {{bucket_bytes: {case.head['bucket']}}}")
    if "train_steps" in case.head:
        lines.append(f"train: {{steps: {case.head['train_steps']}}}")
    if stage is not None:
        lines.append(f"zero: {{stage: {stage}}}")
    if case.virtual_shards:
        lines.append(f"reproducible: {{virtual_shards: {case.virtual_shards}}}")
    lines.append("groups:")
    for group in case.groups:
        entries = {k: v for k, v in group.items() if k != "match"}
        lines.append(f'  - match: "{group["match"]}"')
        lines += [f"    {k}: {flow(v)}" for k, v in entries.items() if v != {}]
    return "\n".join(lines) + "\n"


def record(case, folder):
    """Writes config, parameters and gradients; @return the oracle's replay and the initial weights."""
    seed = sum(case.like.encode())
    rng = np.random.default_rng(seed)
    count = case.contributions
    gradients = {n: build(rng, case.steps, max(count, 1)) for n, (_, _, build) in case.zoo.items()}
    steps = []
    for t in range(case.steps):
        step = {}
        for name, history in gradients.items():
            if count:
                step.update({f"{name}@{k}": g for k, g in enumerate(history[t])})
            else:
                step[name] = history[t][0]
        steps.append(step)
    if case.bad_step is not None:
        victim = next(k for k in steps[case.bad_step] if "wide" in k)
        steps[case.bad_step][victim] = steps[case.bad_step][victim].copy()
        steps[case.bad_step][victim].flat[3] = np.nan

    # As far as the updates go alone, so far away lies the beginning: neither hides the other.
    still = [
        {**g, "rule": {**g["rule"], "weight_decay": 0.0}, "weights": {}} for g in case.groups
    ]
    shapes = {n: np.zeros(shape) for n, (shape, _, _) in case.zoo.items()}
    updates = oracle.Replay(still, shapes)
    for step in steps:
        updates.step(step)
    start = {}
    for name, (shape, kind, _) in case.zoo.items():
        w = rng.standard_normal(shape)
        if kind == "zero":
            w = rng.integers(-15, 16, shape) / 64.0
        else:
            w *= case.far * np.linalg.norm(updates.weights[name]) / np.linalg.norm(w)
        stored = oracle.group_of(case.groups, name, len(shape))["weights"]["format"]
        start[name] = (oracle.round_bf16(w) if stored == "bf16" else w).astype(np.float32)

    os.makedirs(os.path.join(folder, "grads"))
    with open(os.path.join(folder, "config.yaml"), "w", encoding="ascii") as f:
        f.write(yaml_text(case))
    oracle.write_safetensors(os.path.join(folder, "p.safetensors"), start, bf16=case.bf16_files)
    reference = oracle.Replay(case.groups, start, case.steps)
    for t, step in enumerate(steps):
        oracle.write_safetensors(os.path.join(folder, "grads", f"step-{t + 1:06d}.safetensors"), step)
        reference.step(step)
    for name, (_, kind, _) in case.zoo.items():
        if case.judged_as != "weights":
            break  # step by step, or by what does not depend on how far
        moved = np.linalg.norm(reference.weights[name] - start[name])
        if moved < 0.1 * np.linalg.norm(start[name]):
            raise ValueError(f"{case.name}: {name} moves too little to be judged")
    return reference, start


# --- judging --------------------------------------------------------------------------------------------


def rounds(group):
    """Is the direction rounded to bf16 somewhere: in the iteration, or where pieces are on the wire?"""
    return "bf16" in (group["lmo"]["dtype"], group.get("matrix", {}).get("wire"))


class Judge:
    def __init__(self, options):
        self.options, self.violations, self.rows = options, [], []
        self.rules = self.known_rules()
        self.kept = {}  # case -> output on its first number of ranks
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
        }

    def fail(self, text):
        self.violations.append(text)
        print(f"VIOLATED {text}", file=sys.stderr, flush=True)

    def launch(
        self, folder, ranks, out, params="p.safetensors", grads="grads", config="config.yaml"
    ):
        command = shlex.split(self.options.mpirun) + ["-np", str(ranks), self.options.orthrus]
        command += ["replay", os.path.join(folder, config)]
        command += ["--params", os.path.join(folder, params), "--grads", os.path.join(folder, grads)]
        command += ["--out", os.path.join(folder, out)]
        try:
            return subprocess.run(
                command,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=self.options.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, -1, "", f"no end in {self.options.timeout} s")

    def replay(self, case, folder, ranks, tag="", **files):
        out = f"out-{ranks}{tag}.safetensors"
        done = self.launch(folder, ranks, out, **files)
        if done.returncode == 78 and "is not available in this version" in done.stderr:
            # Said in so many words, at the front door: not there yet is no wrong result.
            self.rows.append((case.name, "", str(ranks), "not there", "", ""))
            return None
        if done.returncode != 0:
            tail = "\n    ".join(done.stderr.strip().splitlines()[:6])
            self.fail(f"{case.name} np {ranks}: exit {done.returncode}\n    {tail}")
            return None
        try:
            tensors, metadata = oracle.read_safetensors(os.path.join(folder, out))
        except (OSError, ValueError, KeyError, oracle.FileError) as problem:
            self.fail(f"{case.name} np {ranks}: {out}: {problem}")
            return None
        for key in ("config_hash", "plan_hash", "ranks", "bytes_sent", "messages"):
            if key not in metadata:
                self.fail(f"{case.name} np {ranks}: no {key} in __metadata__")
        if metadata.get("ranks") != str(ranks):
            self.fail(f"{case.name} np {ranks}: __metadata__ says {metadata.get('ranks')} ranks")
        if ranks == 1 and metadata.get("bytes_sent") != "0":
            self.fail(f"{case.name} np 1: {metadata.get('bytes_sent')} bytes sent to nobody")
        if ranks > 1 and not tag and case.bad_step is None:
            self.as_planned(case, folder, ranks, metadata)
        return tensors

    def as_planned(self, case, folder, ranks, metadata):
        """What `orthrus plan` says before is what `orthrus replay` has counted after."""
        where = f"{case.name} np {ranks}: plan"
        command = [self.options.orthrus, "plan", os.path.join(folder, "config.yaml"), "--json"]
        command += ["--params", os.path.join(folder, "p.safetensors"), "--ranks", str(ranks)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        try:
            plan = json.loads(done.stdout)
            if plan["plan_hash"] != metadata["plan_hash"]:
                self.fail(f"{where}: hash {plan['plan_hash']}, ran with {metadata['plan_hash']}")
            for key in ("bytes_sent", "messages"):
                planned = case.steps * sum(rank[key] for rank in plan["per_rank"])
                if planned != int(metadata[key]):
                    self.fail(f"{where}: {planned} {key} in {case.steps} steps, counted {metadata[key]}")
        except (ValueError, KeyError) as problem:
            self.fail(f"{where}: exit {done.returncode}, {problem!r}\n    {done.stderr[:300]}")

    def same_bits(self, what, a, b):
        if sorted(a) != sorted(b):
            self.fail(f"{what}: the tensors differ by {sorted(set(a) ^ set(b))[:4]}")
            return
        different = [n for n in a if a[n].tobytes() != b[n].tobytes()]
        if different:
            self.fail(f"{what}: other bits in {len(different)} of {len(a)}: {sorted(different)[:4]}")

    def known_rules(self):
        """Rules the program has."""
        command = [self.options.orthrus, "info", "--rules", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return {rule["name"] for rule in json.loads(done.stdout)["rules"]}

    def run(self, case):
        missing = case.rules - self.rules
        if missing:
            self.rows.append((case.name, ", ".join(sorted(missing)), "", "no such rule", "", ""))
            return
        folder = os.path.join(self.options.work, case.name)
        shutil.rmtree(folder, ignore_errors=True)
        reference, start = record(case, folder)
        ranks = case.ranks or self.options.np
        if self.options.quick:
            ranks = [n for n in ranks if n in (1, 3)] or ranks[:2]
        outputs = {n: self.replay(case, folder, n) for n in ranks}
        outputs = {n: o for n, o in outputs.items() if o is not None}
        if len(outputs) < len(ranks):
            return
        self.kept[case.name] = outputs[ranks[0]]
        if case.same_bits_as in self.kept:
            what = f"{case.name} against {case.same_bits_as}"
            self.same_bits(what, outputs[ranks[0]], self.kept[case.same_bits_as])
        if case.virtual_shards:
            first = outputs[ranks[0]]
            for n in ranks[1:]:
                self.same_bits(f"{case.name}: np {n} against np {ranks[0]}", outputs[n], first)
        else:
            n = ranks[-1]
            again = self.replay(case, folder, n, "-again")
            if again is not None:
                self.same_bits(f"{case.name}: np {n} again", again, outputs[n])
        judges = {"weights": self.judge, "codes": self.judge_codes, "phi": self.judge_phi}
        judges["momentum"] = self.judge_momentum
        for n in ranks if not case.virtual_shards else ranks[:1]:
            judges[case.judged_as](case, reference, start, outputs[n], n, ranks)
        if not self.options.keep:
            shutil.rmtree(folder)

    def judge(self, case, reference, start, tensors, n, ranks):
        worst = {}  # (variant, bound) -> (error, parameter)
        for name, (_, kind, _) in case.zoo.items():
            group = reference.groups[name]
            if name not in tensors:
                self.fail(f"{case.name} np {n}: {name} is not in the output")
                continue
            w, want = tensors[name], reference.weights[name]
            self.check_state(case, reference, tensors, name, kind, n)
            if kind == "zero":
                if not np.array_equal(w.astype(np.float64), want):
                    off = np.abs(w - want).max()
                    self.fail(f"{case.name} np {n}: {name}: zero gradient, yet off by {off:.2e}")
                continue
            bound = self.bound(group, kind)
            if group["weights"]["format"] == "bf16" and not np.array_equal(w, oracle.round_bf16(w)):
                self.fail(f"{case.name} np {n}: {name}: weights off the bf16 grid")
            off = oracle.error(w, want, start[name].astype(np.float64))
            if not off <= bound:
                self.fail(f"{case.name} np {n}: {name}: error {off:.2e} > {bound:.0e}")
            parts = name.removesuffix(".weight").split(".")
            key = (".".join(parts[:-1]) or name, bound)
            if key not in worst or off > worst[key][0]:
                worst[key] = (off, parts[-1])
        listed = "=".join(map(str, ranks)) if case.virtual_shards else f"{n}"
        for (variant, bound), (off, name) in worst.items():
            self.rows.append((case.name, variant, listed, f"{off:.1e}", name, f"{bound:.0e}"))

    def after_every_step(self, case, folder, tensors, n):
        """Where the program stands after 1, 2, ... steps."""
        stood = []
        for t in range(1, case.steps):
            os.makedirs(os.path.join(folder, f"grads-{t}"))
            for k in range(1, t + 1):
                step = f"step-{k:06d}.safetensors"
                os.link(os.path.join(folder, "grads", step), os.path.join(folder, f"grads-{t}", step))
            stood.append(self.replay(case, folder, n, f"-{t}", grads=f"grads-{t}"))
        return [*stood, tensors]

    def judge_momentum(self, case, _, start, tensors, n, ranks):
        """Every step from where the program stood before it: the momentum is what its bits round that of
        float64 to, but for what f32 rounds on the way; the weights are those of the momentum before."""
        folder = os.path.join(self.options.work, case.name)
        stood = self.after_every_step(case, folder, tensors, n)
        if None in stood:
            return
        follow, worst = oracle.Replay(case.groups, start), {}
        for t, found in enumerate(stood):
            path = os.path.join(folder, "grads", f"step-{t + 1:06d}.safetensors")
            before = {name: w.copy() for name, w in follow.weights.items()}
            follow.step(oracle.read_safetensors(path)[0])
            for name, (_, kind, _) in case.zoo.items():
                rule, grid = name.split(".")[0], oracle.momentum_grid(follow.groups[name]["state"])
                state, wide = follow.state[name], follow.wide_momentum[name]
                momentum = oracle.view_of_rows(found[f"state/{name}/momentum"].astype(np.float64))
                scales = grid.scales(wide)
                values = momentum / grid.spread(scales, wide.shape)
                # int8: code * scale is rounded to f32, so is the scale, and the maximum it is made of.
                codes = values if grid.format == "bf16" else np.rint(values)
                errors = {"momentum": np.abs(values - codes).max() / (127 * 2.0**-24)}
                if kind != "zero":
                    unit = 2.0**-24 * np.abs(wide).max()
                    outside = grid.excess(wide, codes, scales, follow.u_momentum[name]).max()
                    errors["momentum"] = max(errors["momentum"], outside / unit)
                    off = oracle.error(found[name], follow.weights[name], before[name])
                    errors["weights"] = off
                    for key in set(state) - {"momentum"}:
                        want = state[key].ravel()
                        have = found[f"state/{name}/{key}"].astype(np.float64).ravel()
                        errors[key] = np.linalg.norm(have - want) / np.linalg.norm(want)
                for what, off in errors.items():
                    off = float(np.nan_to_num(off, nan=np.inf))
                    # Of the largest momentum: its terms and the 8 contributions, each rounded once. A
                    # direction is made by an f32 iteration, and NorMuon's lines are of that.
                    bound = {"momentum": 16.0, "weights": 1e-4, "row_second_moment": 1e-3}.get(what, 1e-5)
                    key = (rule, what, bound)
                    worst[key] = max(worst.get(key, (-1.0, "")), (off, f"{name}, step {t + 1}"))
                state["momentum"] = momentum.reshape(follow.weights[name].shape)
                follow.weights[name] = found[name].astype(np.float64)
                follow.master[name] = follow.weights[name]
        for (rule, what, bound), (off, where) in worst.items():
            if not off <= bound:
                self.fail(f"{case.name} {rule}: {what} off by {off:.2e} > {bound:.0e} ({where})")
            row = (case.name, f"{rule}: {what}", "=".join(map(str, ranks)))
            self.rows.append((*row, f"{off:.1e}", where, f"{bound:.0e}"))

    def judge_codes(self, case, _, start, tensors, n, ranks):
        """Every step from where the program stood before it. Rounding is not continuous: codes are
        followed, and each must be the one its weight in float64 is rounded to, but for what f32 rounds
        on the way; momentum is not followed, so that all of E is in it. Other stages: the same bits."""
        folder = os.path.join(self.options.work, case.name)
        stood = self.after_every_step(case, folder, tensors, n)
        for stage, other in ((1, 2), (3, 3)):
            config = f"stage-{stage}.yaml"
            with open(os.path.join(folder, config), "w", encoding="ascii") as f:
                f.write(yaml_text(case, stage))
            found = self.replay(case, folder, other, f"-stage{stage}", config=config)
            if found is not None:
                what = f"{case.name}: zero.stage {stage}, np {other} against stage 2, np {n}"
                self.same_bits(what, found, tensors)
        if None in stood:
            return
        follow = oracle.Replay(case.groups, start, case.steps)
        worst = {}  # (variant, what) -> (error, parameter)
        for t, found in enumerate(stood):
            path = os.path.join(folder, "grads", f"step-{t + 1:06d}.safetensors")
            before = {name: np.abs(w).max() for name, w in follow.weights.items()}
            codes = {name: self.codes_of(case, follow, found, name, n) for name in case.zoo}
            if None in codes.values():
                return
            seen = {
                name: (values * scale).reshape(follow.weights[name].shape)
                for name, (values, _, scale) in codes.items()
            }
            follow.step(oracle.read_safetensors(path)[0], seen)
            for name, (values, scales, _) in codes.items():
                kind = case.zoo[name][1]
                for what, off in self.step_errors(
                    follow, found, name, kind, values, scales, before[name]
                ):
                    off = float(np.nan_to_num(off, nan=np.inf))  # `max` would pass over a NaN
                    parts = name.removesuffix(".weight").split(".")
                    bound = self.step_bound(follow.groups[name]["rule"]["name"], what)
                    key = (".".join(parts[:-1]), what, bound)
                    worst[key] = max(worst.get(key, (-1.0, "")), (off, f"{parts[-1]}, step {t + 1}"))
        for (variant, what, bound), (off, where) in worst.items():
            if not off <= bound:
                self.fail(f"{case.name} {variant}: {what} off by {off:.2e} > {bound:.0e} ({where})")
            row = (case.name, f"{variant}: {what}", "=".join(map(str, ranks)))
            self.rows.append((*row, f"{off:.1e}", where, f"{bound:.0e}"))

    def codes_of(self, case, replay, tensors, name, n):
        """@return (codes as numbers, scales, the scale of each), when they are what they must be."""
        where, w = f"{case.name} np {n}: {name}", replay.weights[name]
        grid = oracle.Grid(replay.groups[name]["weights"])
        rows = oracle.view_of_rows(w)
        if grid.format == "bf16":
            values = oracle.view_of_rows(tensors[name]).astype(np.float64)
            return values, np.ones(len(values), np.float32), np.ones_like(values)
        if f"{name}.codes" not in tensors or f"{name}.scales" not in tensors:
            return self.fail(f"{where}: no codes or scales")
        codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        pitch = (rows.shape[1] + 1) // 2 if grid.format == "int4" else rows.shape[1]
        shape = grid.maxima(rows).shape
        if codes.shape != (rows.shape[0], pitch) or scales.shape != shape or scales.dtype != np.float32:
            return self.fail(f"{where}: codes {codes.shape}, scales {scales.shape}, expected {shape}")
        try:
            values = grid.decode(codes, rows.shape)
        except oracle.FileError as problem:
            return self.fail(f"{where}: {problem}")
        if not np.isfinite(values).all() or not (scales >= np.float32(1e-12)).all():
            return self.fail(f"{where}: codes that are none, or scales that are too small")
        spread = grid.spread(scales, rows.shape)
        if not np.array_equal(values.astype(np.float32) * spread, oracle.view_of_rows(tensors[name])):
            return self.fail(f"{where}: weights other than code times scale")
        return values, scales, spread.astype(np.float64)

    @staticmethod
    def step_errors(follow, found, name, kind, values, scales, before):
        """What a step is judged by: how far weights lie outside the cells of their codes and scales from
        what they are made of, in roundings of the largest weight, and the state's relative errors."""
        wide = oracle.view_of_rows(follow.wide[name])
        grid = oracle.Grid(follow.groups[name]["weights"])
        unit = 2.0**-24 * max(before, np.abs(wide).max())
        u = follow.u[name]
        yield "codes", grid.excess(wide, values, scales, u).max() / unit
        if grid.format == "bf16" and not np.array_equal(values, oracle.round_bf16(values)):
            yield "codes", np.inf
        largest, made = grid.values[-1], scales.astype(np.float64)
        if grid.pow2:
            most = grid.maxima(wide)
            off = np.maximum(most - made * largest, made * largest / 2 - most).max()
            off = off if np.all(np.frexp(made)[0] == 0.5) else np.inf
            yield "scales", max(off, 0.0) / unit
        elif grid.format != "bf16":
            yield "scales", np.abs(made - grid.scales(wide)).max() * largest / unit
        if kind == "zero":
            return  # decayed weights keep their codes: E, and with it all of M, is f32's own rounding
        for key, want in follow.state[name].items():
            have = found.get(f"state/{name}/{key}")
            off = np.inf if have is None else np.linalg.norm(have.astype(np.float64) - want)
            yield key, off / np.linalg.norm(want)

    @staticmethod
    def step_bound(rule, what):
        if what in ("codes", "scales"):
            # rho W, eta U, their difference, code * scale, the 8 contributions of G and the terms of U are
            # each rounded to f32, by a unit at most; the U of a matrix comes out of products in f32. The
            # largest codes lie 2^17 of these units apart in int8, 2^20 in fp8_e4m3, 2^21 in int4.
            return 32.0 if rule in oracle.MATRIX_RULES else 16.0
        # 64 units of M: its own roundings, and those of W, which E is and 1/s makes as large beside M as
        # W is beside s M. Twice as many where U comes out of products, as above.
        return 8e-6 if rule in oracle.MATRIX_RULES else 4e-6

    def judge_phi(self, case, _, start, tensors, n, ranks):
        """W - sM against the run in float64 from the same beginning that keeps all of W."""
        folder = os.path.join(self.options.work, case.name, "grads")
        begin = oracle.Replay(case.groups, start).weights
        free = oracle.Replay([{**g, "weights": {}} for g in case.groups], begin)
        for step in sorted(os.listdir(folder)):
            free.step(oracle.read_safetensors(os.path.join(folder, step))[0])
        worst = {}
        for name, group in free.groups.items():
            s = oracle.returns(group, case.steps + 1, case.steps)
            w, momentum = tensors[name].astype(np.float64), tensors[f"state/{name}/momentum"]
            want = free.weights[name] - s * free.state[name]["momentum"]
            size = np.abs(w).max() + s * np.abs(momentum).max()
            off = (float(np.nan_to_num(np.abs(w - s * momentum - want).max() / size, nan=np.inf)), name)
            key = name.split(".")[0]
            # Of those that must miss it, the one that comes nearest.
            worst[key] = (min if key.startswith("not-") else max)(worst.get(key, off), off)
        # W and M are each rounded a few times a step, to 2^-24 of the largest.
        bound = case.steps * 4 * 2.0**-24
        for kind, (off, name) in worst.items():
            misses = kind.startswith("not-")
            if not (off > 3 * bound if misses else off <= bound):
                self.fail(f"{case.name} np {n}: {name}: W - sM off by {off:.1e} of its size, {bound:.0e}")
            name = name.removesuffix(".weight").removeprefix(f"{kind}.")
            limit = f"> {3 * bound:.0e}" if misses else f"{bound:.0e}"
            self.rows.append((case.name, f"{kind}: W - sM", f"{n}", f"{off:.1e}", name, limit))

    @staticmethod
    def bound(group, kind):
        if group["weights"].get("rounding") == "stochastic":
            return 3e-2  # the grid's own noise, 2^-8 relative per step; the reference rounds to nearest
        if group["weights"]["format"] == "bf16":
            return 1e-2  # f32 and f64 may round a weight to neighbours on the grid, a few per thousand
        if group["rule"]["name"] in oracle.MATRIX_RULES:
            if rounds(group):
                return 3e-2 if kind == "gaussian" else 0.3
            name = group["rule"]["name"]
            # The sum of XX^T in f32 drowns small eigenvalues. Two-sided PRISM is made of such sums anyhow,
            # and they are damped by little more than f32 rounds.
            in_gram = group.get("matrix", {}).get("mode") == "gram"
            sums = in_gram or group["lmo"]["coefficients"] == "rational" or name == "bidirectional_prism"
            if sums and kind == "ill" and name not in oracle.KRONECKER_RULES:
                return 5e-3
            # [M; gamma N] of a matrix that is not ill may be nearly square, and as good as ill itself.
            if in_gram and name == "prism" and group["rule"]["side"] != "short":
                return 1e-3
            # Eigenvalues near the floor, which is what f32 rounds, are off by a good part of themselves:
            # one or two of a matrix's lines. KL's factors begin as multiples of 1, and SOAP has an eps.
            if name in ("shampoo", "one_sided_shampoo") and kind == "ill":
                return 5e-2
        return 1e-4

    def check_state(self, case, reference, tensors, name, kind, n):
        for key, want in reference.state[name].items():
            have = tensors.get(f"state/{name}/{key}")
            where = f"{case.name} np {n}: state/{name}/{key}"
            if have is None:
                self.fail(f"{where} is missing")
            elif have.size != want.size or (key != "row_second_moment" and have.shape != want.shape):
                self.fail(f"{where}: shape {have.shape}, expected {want.shape}")
            elif key == "row_second_moment" and kind == "ill":
                continue  # a function of the direction, which is only held to a loose bound there
            else:
                bound = 1e-5
                if key == "row_second_moment":
                    bound = 5e-2 if rounds(reference.groups[name]) else 1e-3
                off = np.linalg.norm(have.astype(np.float64).reshape(want.shape) - want)
                if not off <= bound * np.linalg.norm(want):
                    self.fail(f"{where}: off by {off:.2e} of {np.linalg.norm(want):.2e}")
        step = tensors.get(f"state/{name}/step")
        if step is not None and not np.all(step == reference.steps):
            self.fail(f"{case.name} np {n}: state/{name}/step is {step}, not {reference.steps}")

    def refusals(self):
        """What must not run ends with the promised exit code, and writes nothing."""
        groups, zoo = plain_zoo()
        case = Case("refusals", groups, zoo, [1])
        folder = os.path.join(self.options.work, case.name)
        shutil.rmtree(folder, ignore_errors=True)
        record(case, folder)

        def at(*parts):
            return os.path.join(folder, *parts)

        with open(at("p.safetensors"), "rb") as f:
            blob = f.read()
        for name, content in (
            ("cut.safetensors", blob[:-3]),
            ("empty.safetensors", b""),
            ("huge.safetensors", b"\xff" * 8 + blob[8:]),
        ):
            with open(at(name), "wb") as f:
                f.write(content)
        reserved = {"m.codes": np.ones((2, 2))}
        oracle.write_safetensors(at("renamed.safetensors"), reserved)
        os.makedirs(at("renamed"))
        oracle.write_safetensors(
            at("renamed", "step-000001.safetensors"), {f"m.codes@{k}": reserved["m.codes"] for k in range(8)}
        )
        oracle.write_safetensors(at("other.safetensors"), {"m.wide.weight": np.zeros((3, 3))})
        os.makedirs(at("none"))
        with open(at("config.yaml"), encoding="ascii") as f:
            text = f.read()

        def refused(what, code, ranks=1, config=text, **where):
            with open(at("config.yaml"), "w", encoding="ascii") as f:
                f.write(config)
            out = where.pop("out", "refused.safetensors")
            done = self.launch(folder, ranks, out, **where)
            if done.returncode not in code:
                self.fail(f"{what}: exit {done.returncode}, expected {code}\n    {done.stderr[:300]}")
            elif not done.stderr.strip():
                self.fail(f"{what}: exit {code} without a word")
            if os.path.exists(at(out)):
                self.fail(f"{what}: refused, yet wrote {out}")
            self.rows.append(("refusals", what, str(ranks), f"exit {done.returncode}", "", str(code)[1:-1]))

        refused("missing parameters", {78}, params="nobody.safetensors")
        refused("missing gradients", {78}, grads="nowhere")
        refused("no recorded step", {78}, grads="none")
        refused("truncated parameters", {65}, ranks=2, params="cut.safetensors")
        refused("empty parameters", {65}, params="empty.safetensors")
        refused("header longer than the file", {65}, params="huge.safetensors")
        refused("reserved name", {78}, params="renamed.safetensors", grads="renamed")
        refused("gradient of another shape", {65, 78}, ranks=2, params="other.safetensors")
        refused("contributions other than shards", {78}, 2, text.replace("shards: 8", "shards: 4"))
        refused("unknown key", {78}, config=text.replace("schema: 1", "schema: 1\nsead: 3"))
        refused("unknown rule", {78}, config=text.replace("name: muon", "name: moun"))
        for mode in ("gram", "gram_steps", "block_cyclic", "block_local"):
            other = text.replace("  - match: \"m.*\"", f"  - match: \"m.*\"\n    matrix: {{mode: {mode}}}")
            refused(f"reproducible sums in mode {mode}", {78}, 2, other)
        refused("no folder for the output", {73}, out=os.path.join("missing", "out.safetensors"))
        if not self.options.keep:
            shutil.rmtree(folder)

    def table(self):
        head = ("case", "variant", "ranks", "worst error", "at", "bound")
        if self.options.markdown:
            lines = ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *self.rows)]
        else:
            widths = [max(len(r[i]) for r in (head, *self.rows)) for i in range(len(head))]
            lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in (head, *self.rows)]
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orthrus", help="the program to judge")
    parser.add_argument("--mpirun", default="mpirun --bind-to none", help="how to launch ranks")
    parser.add_argument("--np", default="1,2,3,4,7", help="numbers of ranks, the first is the yardstick")
    parser.add_argument("--cases", default="", help="only these (comma-separated); `list` names them")
    parser.add_argument("--work", help="folder for the files (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="ranks 1 and 3 only")
    parser.add_argument("--keep", action="store_true", help="leave the files of every case")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per launch")
    options = parser.parse_args()
    options.np = [int(n) for n in options.np.split(",")]
    cases = all_cases()
    if options.cases == "list":
        print("\n".join([c.name for c in cases] + ["refusals"]))
        return 0
    if not options.orthrus:
        parser.error("--orthrus is needed")
    options.orthrus = os.path.abspath(options.orthrus)
    chosen = [c for c in options.cases.split(",") if c]
    unknown = set(chosen) - {c.name for c in cases} - {"refusals"}
    if unknown:
        parser.error(f"no case {sorted(unknown)}; --cases list names them")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orthrus-replay-") as temporary:
        options.work = os.path.abspath(options.work or temporary)
        judge = Judge(options)
        for case in cases:
            if not chosen or case.name in chosen:
                judge.run(case)
        if not chosen or "refusals" in chosen:
            judge.refusals()
    print(judge.table())
    print(
        f"{len(judge.rows)} comparisons, {len(judge.violations)} violations, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if judge.violations else 0


if __name__ == "__main__":
    sys.exit(main())
