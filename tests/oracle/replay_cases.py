"""Replays a zoo of recorded gradients through `orthrus replay` and judges the weights by the oracle.

For every case: the same bits on every number of ranks (where `reproducible` promises it) and run to run,
an error ||W - W_ref|| / ||W_ref - W_0|| within its bound, exactly decayed weights under a zero gradient,
the optimizer state, and the bytes and messages `orthrus plan` announces. Prints a table; exits 1 when
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
        # Ranks that hold state but contribute no gradient.
        Case("few-shards", groups, zoo, [1, 2, 5], virtual_shards=4, contributions=4),
        # Without `reproducible`: uneven runs of contributions per rank, D1 only.
        Case("free-order", groups, {**zoo, **large}, [1, 2, 3], virtual_shards=0),
        Case("one-gradient", groups, zoo, [1, 3], virtual_shards=0, contributions=0),
        Case("clipped", clipped, zoo, [1, 3]),
        # One non-finite entry of one contribution: nobody moves in that step.
        Case("bad-step", groups, zoo, [1, 3], bad_step=2),
    ]


# --- recording ------------------------------------------------------------------------------------------


def yaml_text(case):
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
            w *= np.linalg.norm(updates.weights[name]) / np.linalg.norm(w)
        stored = oracle.group_of(case.groups, name, len(shape))["weights"]["format"]
        start[name] = (oracle.round_bf16(w) if stored == "bf16" else w).astype(np.float32)

    os.makedirs(os.path.join(folder, "grads"))
    with open(os.path.join(folder, "config.yaml"), "w", encoding="ascii") as f:
        f.write(yaml_text(case))
    oracle.write_safetensors(os.path.join(folder, "p.safetensors"), start, bf16=case.bf16_files)
    reference = oracle.Replay(case.groups, start)
    for t, step in enumerate(steps):
        oracle.write_safetensors(os.path.join(folder, "grads", f"step-{t + 1:06d}.safetensors"), step)
        reference.step(step)
    for name, (_, kind, _) in case.zoo.items():
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

    def launch(self, folder, ranks, out, params="p.safetensors", grads="grads"):
        command = shlex.split(self.options.mpirun) + ["-np", str(ranks), self.options.orthrus]
        command += ["replay", os.path.join(folder, "config.yaml")]
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

    def replay(self, case, folder, ranks, tag=""):
        out = f"out-{ranks}{tag}.safetensors"
        done = self.launch(folder, ranks, out)
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

    def run(self, case):
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
        for n in ranks if not case.virtual_shards else ranks[:1]:
            self.judge(case, reference, start, outputs[n], n, ranks)
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

    @staticmethod
    def bound(group, kind):
        if group["weights"].get("rounding") == "stochastic":
            return 3e-2  # the grid's own noise, 2^-8 relative per step; the reference rounds to nearest
        if group["weights"]["format"] == "bf16":
            return 1e-2  # f32 and f64 may round a weight to neighbours on the grid, a few per thousand
        if group["rule"]["name"] in oracle.MATRIX_RULES:
            if rounds(group):
                return 3e-2 if kind == "gaussian" else 0.3
            # The sum of XX^T in f32 drowns small eigenvalues.
            through_gram = group.get("matrix", {}).get("mode") == "gram"
            if (through_gram or group["lmo"]["coefficients"] == "rational") and kind == "ill":
                return 5e-3
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
