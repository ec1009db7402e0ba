"""The judge of `orthrus replay`: every update rule again, in float64, from the formulas alone.

Nothing here is shared with the library: a reader and writer of safetensors, the coefficient tables, the
rules, the norms. A spectral direction is U p(sigma/nu) V^T of a singular value decomposition, with p the
composition of the named table's polynomials, or the rational function; no Newton-Schulz iteration is run,
and nothing is inverted.
"""

import json
import math
import re
import struct

import numpy as np

# --- files ----------------------------------------------------------------------------------------------


class FileError(Exception):
    """A safetensors file that breaks the format."""


_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
_NUMPY |= {"F8_E4M3": "u1", "F8_E5M2": "u1"}  # as they stand: `Grid.decode` reads them


def bf16_bits(x):
    """The upper half of f32(x), rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def bf16_value(bits):
    return (np.asarray(bits, dtype=np.uint32) << 16).view(np.float32)


def round_bf16(x):
    """x in float64, on the bf16 grid (through f32, as stored weights go)."""
    return bf16_value(bf16_bits(x)).astype(np.float64).reshape(np.shape(x))


def read_safetensors(path):
    """@return ({name: array}, metadata). BF16 arrives as float32."""
    with open(path, "rb") as f:
        blob = f.read()
    if len(blob) < 8:
        raise FileError(f"{path}: {len(blob)} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > len(blob) - 8:
        raise FileError(f"{path}: a header of {length} bytes does not fit")

    def unique(pairs):
        names = [k for k, _ in pairs]
        if len(set(names)) != len(names):
            raise FileError(f"{path}: duplicate keys in the header")
        return dict(pairs)

    header = json.loads(blob[8 : 8 + length], object_pairs_hook=unique)
    data = memoryview(blob)[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors, at = {}, 0
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = row["data_offsets"]
        if begin != at or end > len(data):
            raise FileError(f"{path}: {name} lies at [{begin}, {end}), expected to begin at {at}")
        at = end
        dtype = "<u2" if row["dtype"] == "BF16" else _NUMPY[row["dtype"]]
        array = np.frombuffer(data[begin:end], dtype=dtype)
        if array.size != math.prod(row["shape"]):
            raise FileError(f"{path}: {name} holds {array.size} values, its shape {row['shape']}")
        if row["dtype"] == "BF16":
            array = bf16_value(array)
        tensors[name] = array.reshape(row["shape"])
    if at != len(data):
        raise FileError(f"{path}: {len(data) - at} bytes belong to no tensor")
    return tensors, metadata


def write_safetensors(path, tensors, metadata=None, bf16=()):
    """Writes float32 tensors; those named in `bf16` as BF16."""
    header = {} if metadata is None else {"__metadata__": metadata}
    chunks, at = [], 0
    for name, array in tensors.items():
        chunk = (bf16_bits(array) if name in bf16 else np.ascontiguousarray(array, "<f4")).tobytes()
        header[name] = {
            "dtype": "BF16" if name in bf16 else "F32",
            "shape": list(np.shape(array)),
            "data_offsets": [at, at + len(chunk)],
        }
        chunks.append(chunk)
        at += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for chunk in chunks:
            f.write(chunk)


# --- polynomials ----------------------------------------------------------------------------------------

_PE = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
_LAST = (1.875, -1.25, 0.375)

# name: (polynomials, the last of which repeats; factor on the Frobenius norm)
TABLES = {
    "jordan": ([(3.4445, -4.7750, 2.0315)], 1.0),
    "you5": (
        [
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ],
        1.0,
    ),
    "polar_express": (_PE + [_LAST], 1.0),
    "polar_express_101": (
        [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _PE] + [_LAST],
        1.01,
    ),
    "polar_express_105": (
        [
            (7.89258287442441, -20.3830139458796, 13.5553061494069),
            (3.91148486813543, -2.54646359290609, 0.426898831967307),
            (3.76065795569742, -2.51281901821656, 0.432364734907007),
            (3.16039967368629, -2.1496495188985, 0.399636690766439),
            (2.19109716186173, -1.44166201021466, 0.328146487623155),
        ],
        1.0,
    ),
    "dion_pe102": (
        [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ],
        1.02,
    ),
    "torch_pe10": (
        [
            (8.237312, -23.157747, 16.680568),
            (4.082442, -2.893048, 0.525285),
            (3.926348, -2.854747, 0.531802),
            (3.298219, -2.424542, 0.486320),
            (2.297037, -1.636626, 0.400263),
            (1.876381, -1.234790, 0.358919),
            (1.856442, -1.213245, 0.356800),
            (1.856435, -1.213237, 0.356799),
            (1.856431, -1.213229, 0.356795),
            (1.874995, -1.249991, 0.374995),
        ],
        1.0,
    ),
    "cans": (
        [
            (8.47032880384807, -25.108074706661874, 18.629275599118014),
            (4.182834183293938, -3.1087011098892385, 0.5806066813500486),
            (3.9618572789615993, -2.9540637463593793, 0.5629761179538966),
            (3.2865862170279607, -2.464720134531282, 0.5073576938614548),
            (2.2737499944340396, -1.6446603679080694, 0.4161909274978861),
            (1.8887161973518283, -1.2651572253385992, 0.3765189255574897),
            _LAST,
        ],
        1.0,
    ),
    "eco8": (
        [
            (7.2086, -15.5131, 9.0178),
            (3.9623, -2.5813, 0.4542),
            (3.9466, -2.5765, 0.4544),
            (3.8991, -2.5671, 0.4566),
            (3.7186, -2.5308, 0.4653),
            (3.1390, -2.3073, 0.4733),
            (2.1715, -1.5246, 0.3885),
            (1.8648, -1.2224, 0.3577),
        ],
        1.0,
    ),
    "cubic5": (
        [
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ],
        1.0,
    ),
    "dsv4_10": ([(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)], 1.0),
    "pade5": ([(15 / 8, -10 / 8, 3 / 8)], 1.0),
    "pade3": ([(1.5, -0.5, 0.0)], 1.0),
    "modula": ([(3.0, -16 / 5, 6 / 5)], 1.0),
}


def composed(x, table, iterations):
    """p(x): the first `iterations` polynomials of the table, one after the other."""
    polynomials = TABLES[table][0]
    x = np.array(x, dtype=np.float64)
    for i in range(iterations):
        a, b, c = polynomials[min(i, len(polynomials) - 1)]
        square = x * x
        x = x * (a + square * (b + square * c))
    return x


# --- the rational function ------------------------------------------------------------------------------


def _sn_cn(u, complement):
    """Jacobi's sn and cn of u for the modulus sqrt(1 - complement^2), by the arithmetic-geometric mean."""
    a, b, c = 1.0, complement, math.sqrt(1 - complement * complement)
    ladder = []
    while abs(c) > 1e-16 * a:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        ladder.append((a, c))
    phi = math.ldexp(a * u, len(ladder))
    for mean, difference in reversed(ladder):
        phi = (phi + math.asin(difference / mean * math.sin(phi))) / 2
    return math.sin(phi), math.cos(phi)


def zolotarev(lower, terms):
    """The odd rational function of type (2r + 1, 2r) nearest to 1 on [lower, 1]: x -> f(x)."""
    a, b = 1.0, lower  # K of the modulus sqrt(1 - lower^2) is pi / 2 over this mean
    for _ in range(64):
        a, b = (a + b) / 2, math.sqrt(a * b)
    quarter = math.pi / (2 * a)
    c = []
    for i in range(1, 2 * terms + 1):
        sn, cn = _sn_cn(i * quarter / (2 * terms + 1), lower)
        c.append((lower * sn / cn) ** 2)

    def plain(x):
        square = x * x
        for j in range(terms):
            x = x * (square + c[2 * j + 1]) / (square + c[2 * j])
        return x

    grid = plain(np.geomspace(lower, 1, 200001))
    scale = 2 / (grid.min() + grid.max())
    return lambda x: scale * plain(np.asarray(x, dtype=np.float64))


LOWER_OF_TERMS = {2: 5e-3, 3: 2e-3, 4: 1e-3}


def rational_values(x, sigma, terms):
    """f(sigma / sqrt(s2)). Twelve Lanczos steps find the largest eigenvalue of a Gram matrix of 12 lines."""
    if min(x.shape) > 12:
        raise ValueError("the oracle knows s2 only where 12 Lanczos steps are exact")
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    s2 = min(1.1 * sigma[0] ** 2, np.linalg.norm(gram), np.abs(gram).sum(axis=0).max())
    return zolotarev(LOWER_OF_TERMS[terms], terms)(sigma / math.sqrt(s2))


# --- norms ----------------------------------------------------------------------------------------------

LMO_DEFAULTS = {
    "norm": "spectral",
    "coefficients": "polar_express_101",
    "iterations": 5,
    "scale": "original",
    "eps_mode": "none",
    "eps": 1e-7,
    "dtype": "f32",
    "terms": 3,
}


def _safe_divide(x, by):
    return np.divide(x, by, out=np.zeros_like(x), where=by > 0)


def lmo(x, recipe):
    """The unit-norm matrix along x (for `spectral`, as well as the table's polynomial reaches it)."""
    norm = recipe["norm"]
    if norm == "sign":
        return np.sign(x)
    if norm == "row":
        return _safe_divide(x, np.sqrt((x * x).sum(axis=1, keepdims=True)) + np.zeros_like(x))
    if norm == "column":
        return _safe_divide(x, np.sqrt((x * x).sum(axis=0, keepdims=True)) + np.zeros_like(x))
    frobenius = math.sqrt((x * x).sum())
    if frobenius == 0:
        return np.zeros_like(x)
    if norm == "frobenius":
        return x / frobenius
    if norm != "spectral":
        raise ValueError(norm)
    if recipe["coefficients"] == "rational":
        u, sigma, vt = np.linalg.svd(x, full_matrices=False)
        return (u * rational_values(x, sigma, recipe["terms"])) @ vt
    nu = TABLES[recipe["coefficients"]][1] * frobenius
    if recipe["eps_mode"] == "add":
        nu += recipe["eps"]
    elif recipe["eps_mode"] == "clamp":
        nu = max(nu, recipe["eps"])
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    return (u * composed(sigma / nu, recipe["coefficients"], recipe["iterations"])) @ vt


def scale_factor(rows, cols, name):
    return {
        "original": math.sqrt(max(1.0, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "rms_to_rms": math.sqrt(rows / cols),
        "rms_to_rms_max": max(1.0, math.sqrt(rows / cols)),
        "spectral": 1.0,
    }[name]


# --- rules ----------------------------------------------------------------------------------------------

RULE_DEFAULTS = {
    "muon": {
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "momentum_form": "ema",
    },
    "normuon": {
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "momentum_form": "ema",
        "beta2": 0.95,
        "eps": 1e-10,
        "axis": "rows",
    },
    "adamw": {
        "lr": 3e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "eps_placement": "torch",
    },
    "sgd": {
        "lr": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
        "momentum_form": "heavy_ball",
    },
    "lion": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.0},
    "prism": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "damp_first_step": True}
    | {"gamma": 1.0, "side": "short"},
    "bidirectional_prism": {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "damp_first_step": True}
    | {"gamma_left": 1.0, "gamma_right": 1.0, "eps": 1e-6},
    "shampoo": {"lr": 0.01, "momentum": 0.9, "beta2": 0.99, "weight_decay": 0.0, "frequency": 10}
    | {"eps": 1e-12, "exponent": 0.0, "bias_correction": True, "trace_scaling": False}
    | {"grafting": "none", "grafting_beta2": 0.999, "grafting_eps": 1e-10},
    "one_sided_shampoo": {"lr": 0.05, "momentum": 0.95, "beta2": 0.95, "weight_decay": 0.0}
    | {"frequency": 1, "eps": 1e-8, "bias_correction": False},
    "kl_shampoo": {"lr": 1e-3, "momentum": 0.9, "beta2": 0.95, "weight_decay": 0.0, "frequency": 10}
    | {"eps": 1e-12, "bias_correction": False},
    "soap": {"lr": 3e-3, "betas": [0.9, 0.95], "shampoo_beta": 0.95, "weight_decay": 0.0}
    | {"frequency": 10, "eps": 1e-8, "max_dimension": 10000},
}
PRISM_RULES = ("prism", "bidirectional_prism")
KRONECKER_RULES = ("shampoo", "one_sided_shampoo", "kl_shampoo", "soap")
MATRIX_RULES = ("muon", "normuon", *PRISM_RULES, *KRONECKER_RULES)


def _momentum(state, g, rule):
    """Takes g into the momentum; @return what the update looks along."""
    beta = gain(rule)[1]
    take = 1 - beta if rule.get("momentum_form", "ema") == "ema" else 1.0
    state["momentum"] = beta * state["momentum"] + take * g
    return _query(state, g, rule)


def _query(state, g, rule):
    """What the update looks along, of the momentum that has taken g in."""
    beta = gain(rule)[1]
    take = 1 - beta if rule.get("momentum_form", "ema") == "ema" else 1.0
    return take * g + beta * state["momentum"] if rule.get("nesterov") else state["momentum"]


def _adamw_divisor(state, step, rule):
    root = math.sqrt(1 - rule["betas"][1] ** step)
    if rule["eps_placement"] == "torch":
        return np.sqrt(state["second_moment"]) / root + rule["eps"]
    return (np.sqrt(state["second_moment"]) + rule["eps"]) / root


def _scale(shape, group):
    """What lmo.scale says; of Shampoo's family only the one-sided direction is scaled."""
    name = group["rule"]["name"]
    unscaled = name in KRONECKER_RULES and name != "one_sided_shampoo"
    return 1.0 if unscaled else scale_factor(*shape, group["lmo"]["scale"])


def direction(state, g, step, group):
    """U of one logical matrix (matrix rules) or one tensor; W <- (1 - lr wd) W - lr U."""
    rule, name = group["rule"], group["rule"]["name"]
    if name in PRISM_RULES or name in KRONECKER_RULES:
        x = _momentum(state, g, rule)
        make = prism if name == "prism" else bidirectional if name in PRISM_RULES else kronecker
        return _scale(x.shape, group) * make(state, x, g, step, group)
    if name in MATRIX_RULES:
        d = lmo(_momentum(state, g, rule), group["lmo"])
        if name == "normuon":
            along = 0 if rule["axis"] == "long" and d.shape[1] < d.shape[0] else 1
            lines = (d * d).mean(axis=along)
            beta2 = rule["beta2"]
            state["row_second_moment"] = beta2 * state["row_second_moment"] + (1 - beta2) * lines
            below = np.sqrt(state["row_second_moment"]) + rule["eps"]
            flat = d / (below[:, None] if along else below)
            norm = np.linalg.norm(flat)
            d = flat * (np.linalg.norm(d) / norm) if norm > 0 else flat
        return _scale(d.shape, group) * d
    if name == "adamw":
        beta1, beta2 = rule["betas"]
        state["momentum"] = beta1 * state["momentum"] + (1 - beta1) * g
        state["second_moment"] = beta2 * state["second_moment"] + (1 - beta2) * g * g
        return _safe_divide(state["momentum"] / (1 - beta1**step), _adamw_divisor(state, step, rule))
    if name == "lion":
        beta1, beta2 = rule["betas"]
        u = np.sign(beta1 * state["momentum"] + (1 - beta1) * g)
        state["momentum"] = beta2 * state["momentum"] + (1 - beta2) * g
        return u
    if name == "sgd":
        return _momentum(state, g, rule)
    raise ValueError(name)


# --- directions of M and N = G - M -----------------------------------------------------------------------


def _gammas(rule, step, *keys):
    """The weights of N; 0 in a first step that is not to be damped."""
    return [rule[key] if step > 1 or rule["damp_first_step"] else 0.0 for key in keys]


def _is_left(rows, cols, side):
    return side == "left" or (side == "short" and rows <= cols) or (side == "long" and rows > cols)


def prism(state, x, g, step, group):
    """(MM^T + gamma^2 NN^T)^-1/2 M, or M (M^T M + gamma^2 N^T N)^-1/2: M's block of lmo([M, gamma N])."""
    (gamma,), left = _gammas(group["rule"], step, "gamma"), _is_left(*x.shape, group["rule"]["side"])
    z = np.concatenate([x, gamma * (g - x)], axis=1 if left else 0)
    o = lmo(z, group["lmo"])
    # P^-1, by which E comes back: of the side that has the root, as well as the polynomial reaches it.
    state["undo"] = (o @ z.T, None) if left else (None, z.T @ o)
    return o[: x.shape[0], : x.shape[1]]


def power(p, exponent, least=0.0):
    """P^exponent of a symmetric matrix, eigenvalues below `least` taken for it."""
    values, vectors = np.linalg.eigh(p)
    return (vectors * np.maximum(values, least) ** exponent) @ vectors.T


def bidirectional(state, x, g, step, group):
    """L^-1/4 M R^-1/4, L = MM^T + gamma_l^2 NN^T + delta, R = M^T M + gamma_r^2 N^T N + delta."""
    rule, n = group["rule"], g - x
    state["undo"] = np.zeros((len(x), len(x))), np.zeros((x.shape[1], x.shape[1]))
    if not x.any():
        return np.zeros_like(x)
    sides = []
    for gamma, m, new in zip(_gammas(rule, step, "gamma_left", "gamma_right"), (x, x.T), (n, n.T)):
        p = m @ m.T + gamma**2 * new @ new.T
        # eps is a share of the mean over min(rows, cols) directions; a Gram matrix in f32 is only known
        # to 2^-23 of its norm.
        delta = rule["eps"] * np.trace(p) / min(x.shape) + 2.0**-23 * np.linalg.norm(p)
        sides.append(p + delta * np.eye(len(p)))
    state["undo"] = tuple(power(p, 0.25) for p in sides)
    left, right = (power(p, -0.25) for p in sides)
    return left @ x @ right


# --- directions of Kronecker factors ---------------------------------------------------------------------


def _due(step, frequency):
    """In each of the first steps, then in every `frequency`-th: the first matrix of its shape."""
    return step <= frequency or step % frequency == 0


def _joined(state, key, p, beta):
    old = state.get(key)
    new = (1 - beta if beta < 1 else 1.0) * p
    state[key] = new if old is None else beta * old + new
    return state[key]


def _corrected(beta, step, rule=None):
    """1 - b^t of a moving average from 0, where it is to be corrected."""
    return 1 - beta**step if beta < 1 and (rule is None or rule["bias_correction"]) else 1.0


FLOOR = 2.0**-24  # of the norm: what f32 does not know of a factor's eigenvalues


def kronecker(state, x, g, step, group):
    """@param state  factors and what is made of them; `undo` gets P^-1 of both sides, or a function."""
    rule, name = group["rule"], group["rule"]["name"]
    if not g.any() and "made" not in state:
        state["undo"] = lambda e: np.zeros_like(e)
        return np.zeros_like(x)
    made = {"shampoo": shampoo, "one_sided_shampoo": one_sided, "kl_shampoo": kl, "soap": soap}[name]
    return made(state, x, g, step, rule)


def _between(state, x, rule, step):
    """L_i X R_i of roots that are there."""
    left, right = state["made"]
    correction = _corrected(rule["momentum"], step, rule)
    state["undo"] = correction * np.linalg.inv(left), np.linalg.inv(right)
    return left @ x @ right / correction


def shampoo(state, x, g, step, rule):
    """L^-e X R^-e of L = sum b^(t-k) GG^T, R of G^T G. Grafted: as long as Adam's step along X."""
    exponent, roots = rule["exponent"] or 0.25, []
    for key, p in (("left", g @ g.T), ("right", g.T @ g)):
        p = _joined(state, key, p, rule["beta2"]) / _corrected(rule["beta2"], step, rule)
        delta = rule["eps"] + FLOOR * np.linalg.norm(p)
        lift = np.trace(p) ** (exponent / 2) if rule["trace_scaling"] else 1.0
        roots.append(lift * power(p + delta * np.eye(len(p)), -exponent, delta))
    if _due(step, rule["frequency"]):
        state["made"] = roots
    d = _between(state, x, rule, step)
    if rule["grafting"] == "adam":
        second = _joined(state, "second", g * g, rule["grafting_beta2"])
        below = np.sqrt(second / _corrected(rule["grafting_beta2"], step, rule)) + rule["grafting_eps"]
        adam = x / _corrected(rule["momentum"], step, rule) / below
        graft = np.linalg.norm(adam) / np.linalg.norm(d)
        left, right = state["undo"]
        d, state["undo"] = graft * d, (left / graft, right)
    return d


def one_sided(state, x, g, step, rule):
    """L^-1/2 X of the short side."""
    wide = x.shape[0] <= x.shape[1]
    p = _joined(state, "short", g @ g.T if wide else g.T @ g, rule["beta2"])
    p = p / _corrected(rule["beta2"], step)
    delta = rule["eps"] * np.trace(p) / len(p) + FLOOR * np.linalg.norm(p)
    if _due(step, rule["frequency"]):
        root = power(p + delta * np.eye(len(p)), -0.5, delta)
        state["made"] = (root, np.eye(x.shape[1])) if wide else (np.eye(x.shape[0]), root)
    return _between(state, x, rule, step)


def kl(state, x, g, step, rule):
    """L^-1/2 X R^-1/2, L of G R^-1 G^T / cols and R of G^T L^-1 G / rows; both begin as nu I, nu the root
    mean square of the first gradient."""
    rows, cols = x.shape
    if "made" not in state:
        nu = math.sqrt((g * g).mean())
        state |= {"left": nu * np.eye(rows), "right": nu * np.eye(cols)}
        state["made"] = [power(state["left"], -0.5), power(state["right"], -0.5)]
    left, right = state["made"]
    _joined(state, "left", g @ right @ right @ g.T / cols, rule["beta2"])
    _joined(state, "right", g.T @ left @ left @ g / rows, rule["beta2"])
    if _due(step, rule["frequency"]):
        least = [rule["eps"] + FLOOR * np.linalg.norm(state[key]) for key in ("left", "right")]
        state["made"] = [power(state[k], -0.5, a) for k, a in zip(("left", "right"), least)]
    return _between(state, x, rule, step)


def soap(state, x, g, step, rule):
    """Adam in the eigenvectors of L and R: by `eigh` first, then one orthogonal iteration each time. The
    vectors are first put in the order of their Rayleigh quotients, the largest first, and the lines of
    the second moment with them; beyond that it is not turned."""
    first = "made" not in state
    bases = [np.eye(n) for n in x.shape] if first else list(state["made"])
    for side, (key, p) in enumerate((("left", g @ g.T), ("right", g.T @ g))):
        if len(p) > rule["max_dimension"]:
            continue
        p, q = _joined(state, key, p, rule["shampoo_beta"]), bases[side]
        if first:
            bases[side] = np.linalg.eigh(p)[1][:, ::-1]
        elif _due(step, rule["frequency"]):
            order = np.argsort(-np.einsum("ij,ij->j", q, p @ q), kind="stable")
            bases[side] = np.linalg.qr(p @ q[:, order])[0]
            state["second"] = np.take(state["second"], order, axis=side)
    state["made"] = bases
    (left, right), (beta1, beta2) = bases, rule["betas"]
    second = _joined(state, "second", (left.T @ g @ right) ** 2, beta2)
    below = _corrected(beta1, step) * (np.sqrt(second / _corrected(beta2, step)) + rule["eps"])
    state["undo"] = lambda e: left @ (below * (left.T @ e @ right)) @ right.T
    return left @ ((left.T @ x @ right) / below) @ right.T


def undone(state, e):
    """P^-1 E of the direction last made."""
    undo = state["undo"]
    if callable(undo):
        return undo(e)
    left, right = undo
    e = e if left is None else left @ e
    return e if right is None else e @ right


# --- weights as codes and scales ------------------------------------------------------------------------


def _floats(exponent_bits, mantissa_bits, bias, largest):
    """All numbers >= 0 of a small float format up to `largest`, by their bits."""
    steps = 1 << mantissa_bits
    values = [math.ldexp(k / steps, 1 - bias) for k in range(steps)]
    for e in range(1, 1 << exponent_bits):
        values += [math.ldexp(1 + k / steps, e - bias) for k in range(steps)]
    return np.array([v for v in values if v <= largest])


# The magnitudes of each format in ascending order; the place in the list is the code without its sign,
# so that "ties to even" is an even place.
MAGNITUDES = {
    "fp8_e4m3": _floats(4, 3, 7, 448.0),
    "fp8_e5m2": _floats(5, 2, 15, 57344.0),
    "int8": np.arange(128.0),
    "int4": np.arange(8.0),
    "bf16": bf16_value(np.arange(0x7F80)).astype(np.float64),
}


def view_of_rows(array):
    """A parameter as scales see it: rows x the rest; a vector is one row."""
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


class Grid:
    """W = code * scale, a scale per tensor, row, or block of a row; for bf16 the scale is 1."""

    def __init__(self, weights):
        self.format = weights["format"]
        self.values = MAGNITUDES[self.format]
        self.extent = weights.get("scale") or ("block" if weights.get("block") else "row")
        self.block = weights.get("block") if self.extent == "block" else None
        self.pow2 = weights.get("scale_format") == "pow2"

    def maxima(self, w):
        """max |w| of what shares a scale, in the shape scales have in a file."""
        w = np.abs(w)
        if self.extent == "tensor":
            return w.max(keepdims=True).reshape(1)
        if self.extent == "row":
            return w.max(axis=1)
        return np.maximum.reduceat(w, np.arange(0, w.shape[1], self.block), axis=1)

    def scales(self, w):
        """amax / largest, at least 1e-12; with pow2 the power of two from there on."""
        if self.format == "bf16":
            return np.ones(w.shape[0])
        s = np.maximum(self.maxima(w) / self.values[-1], 1e-12)
        return np.exp2(np.ceil(np.log2(s))) if self.pow2 else s

    def spread(self, scales, shape):
        """The scale of every entry."""
        if self.extent == "block":
            return np.repeat(scales, self.block, axis=1)[:, : shape[1]]
        return np.broadcast_to(scales.reshape(-1, 1), shape)

    def cell(self, z):
        """|z| = (1 - d) below + d above, two neighbours of the format. @return place of below, d."""
        a = np.minimum(np.abs(z), self.values[-1])
        place = np.minimum(np.searchsorted(self.values, a, side="right") - 1, len(self.values) - 2)
        below = self.values[place]
        return place, (a - below) / (self.values[place + 1] - below)

    def rounded(self, z, u=None):
        """z on the grid: up in magnitude where u < d; without u, to the nearest, ties to even."""
        place, d = self.cell(z)
        up = (d > 0.5) | ((d == 0.5) & (place % 2 == 1)) if u is None else u < d
        return np.copysign(self.values[place + up], z) + 0.0

    def start(self, w):
        """q(W_0): scale and quotient each rounded to f32, as they are stored."""
        w = w.astype(np.float32)
        scales = self.scales(w).astype(np.float32)
        if not self.pow2 and self.format != "bf16":
            largest = np.float32(self.values[-1])
            scales = np.maximum(self.maxima(w) / largest, np.float32(1e-12))
        values = self.rounded((w / self.spread(scales, w.shape)).astype(np.float64))
        return values * self.spread(scales.astype(np.float64), w.shape)

    def decode(self, codes, shape):
        """What stored codes of a rows x cols matrix stand for; NaN for what no code may be."""
        rows, cols = shape
        if self.format == "int8":
            return np.where(codes == -128, np.nan, codes.astype(np.float64))
        if self.format == "int4":
            nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, -1).astype(np.int64)
            if nibbles[:, cols:].any():
                raise FileError("a nibble beyond the end of a row is not 0")
            signed = nibbles[:, :cols] - 16 * (nibbles[:, :cols] >= 8)
            return np.where(signed == -8, np.nan, signed.astype(np.float64))
        known = np.full(128, np.nan)
        known[: len(self.values)] = self.values
        signed = np.where(codes >= 128, -1.0, 1.0) * known[codes & 127]
        return np.where(codes == 128, np.nan, signed)  # 0 has no sign

    def excess(self, w, values, scales, u=None):
        """How far w lies outside the part of the line that is rounded to values * scales. 0: inside."""
        scale = self.spread(scales.astype(np.float64), w.shape)
        z = w / scale
        place, d = self.cell(z)
        above = values == np.copysign(self.values[place + 1], z)
        below = values == np.copysign(self.values[place], z)
        edge = 0.5 if u is None else u
        gap = self.values[place + 1] - self.values[place]
        off = np.where(above, np.maximum(edge - d, 0), np.maximum(d - edge, 0)) * gap
        return np.where(above | below, off, np.abs(z - values)) * scale


def momentum_grid(rests):
    """What a momentum that rests as `state` says is rounded to."""
    return Grid({"format": "bf16"} if rests["momentum"] == "bf16" else {"format": "int8", "block": rests["block"]})


_WORD = np.uint64(0xFFFFFFFF)


def _mixed(z):
    """The finalizer of SplitMix64."""
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., 2011). @param counter  4 arrays of 32-bit words."""
    c, (k0, k1) = [np.asarray(x, dtype=np.uint64) for x in counter], key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & _WORD,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & _WORD,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def uniforms(count, stream, step, code="", seed=1):
    """u in [0, 1) of elements 0 ... count - 1, for codes: the upper 24 bits of word i mod 4 of counter
    (step, i / 4). For bf16: the low 16 bits of word 0 of counter (step, i), taken from all ones."""
    key = _mixed(_mixed((seed + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)) ^ stream)
    index = np.arange(count if code == "bf16" else (count + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(index)
    words = philox([zero + np.uint64(step), zero, index, zero], (key & 0xFFFFFFFF, key >> 32))
    if code == "bf16":
        return (0xFFFF - (words[0] & np.uint64(0xFFFF)).astype(np.float64)) / 2**16
    return (np.stack(words, axis=-1).reshape(-1)[:count] >> np.uint64(8)).astype(np.float64) / 2**24


# --- what rounding takes, back into the momentum (ECO) --------------------------------------------------


def rate(group, t):
    """lr of step t."""
    schedule = {"kind": "constant", "warmup_steps": 0, "final": 0.0, **group.get("schedule", {})}
    lr, warmup = group["rule"]["lr"], schedule["warmup_steps"]
    if t <= warmup:
        return lr * t / warmup
    if schedule["kind"] == "cosine":
        x = min(1.0, (t - warmup) / (schedule["decay_steps"] - warmup))
        return lr * (schedule["final"] + (1 - schedule["final"]) * (1 + math.cos(math.pi * x)) / 2)
    return lr


def gain(rule):
    """(what the next X has of the momentum, what the next momentum has of it)."""
    if "betas" in rule:
        beta1, beta2 = rule["betas"]
        return beta1, beta2 if rule["name"] == "lion" else beta1
    beta = rule["momentum"]
    return beta * beta if rule.get("nesterov") else beta, beta


def returns(group, t, horizon=None):
    """s_t: what one unit of momentum takes from the weights from step t on.

    Under a constant rate, first * eta / (rho - decay); with a horizon s_t = (first * eta_t + decay *
    s_{t+1}) / rho_t back from there, after which the rate stays.
    """
    first, decay = gain(group["rule"])
    last = t if horizon is None else horizon

    def eta(k):
        return rate(group, min(k, last))

    def rho(k):
        return 1 - eta(k) * group["rule"]["weight_decay"]

    s = first * eta(last) / (rho(last) - decay)
    for k in range(last, t - 1, -1):
        s = (first * eta(k) + decay * s) / rho(k)
    return s


def kappa(group, t, horizon=None):
    """Of step t: -1/s of the next one, or as published. @param horizon  steps, of exact_schedule."""
    kind = group["weights"].get("eco", {}).get("kappa", "exact")
    eta = rate(group, t + 1)
    first, decay = gain(group["rule"])
    if kind == "exact":
        return -1 / returns(group, t + 1)
    if kind == "exact_schedule":
        return -1 / returns(group, t + 1, horizon)
    rho = 1 - eta * group["rule"]["weight_decay"] if kind == "blog" else 1
    return -rho * (1 - decay) / (eta * first)


def guarded(correction, momentum, group, axis=None):
    """No larger than its share of the momentum: of the matrix, or row by row (axis 1)."""
    most = group["weights"].get("eco", {}).get("max_rel_correction", -1)
    if most < 0:
        decay = gain(group["rule"])[1]
        nonlinear = group["rule"]["name"] in ("muon", "normuon", "lion", *PRISM_RULES)
        nonlinear = nonlinear or group["rule"].get("grafting", "none") != "none"
        most = 0.7 * math.sqrt(1 - decay * decay) if nonlinear else 0
    if most == 0:
        return correction
    have = np.linalg.norm(correction, axis=axis, keepdims=axis is not None)
    limit = most * np.linalg.norm(momentum, axis=axis, keepdims=axis is not None)
    return correction * np.where(have > limit, _safe_divide(limit, have + 0.0), 1.0)


def inverse_lmo(x, recipe, e):
    """C with lmo(X) = P X and C = P^-1 E: on the short side of X, U diag(sigma p(sigma/nu)) U^T."""
    if recipe["norm"] != "spectral":
        raise ValueError(recipe["norm"])
    half = lmo(x, recipe) @ x.T if x.shape[0] <= x.shape[1] else x.T @ lmo(x, recipe)
    return half @ e if x.shape[0] <= x.shape[1] else e @ half


def correction(state, g, step, group, e, factor):
    """What the momentum takes of the error e, P^-1 e: U = P X. The state is that after the step."""
    rule, name = group["rule"], group["rule"]["name"]
    if name == "sgd":
        return factor * e
    if name == "adamw":
        beta1, beta2 = rule["betas"]
        return factor * (1 - beta1**step) * _adamw_divisor(state, step, rule) * e
    if name == "lion":
        beta1, beta2 = rule["betas"]
        before = (state["momentum"] - (1 - beta2) * g) / beta2
        return factor * np.abs(beta1 * before + (1 - beta1) * g) * e
    if name == "muon":
        x = _query(state, g, rule)
        return factor / _scale(x.shape, group) * inverse_lmo(x, group["lmo"], e)
    if name in PRISM_RULES or name in KRONECKER_RULES:
        return factor / _scale(e.shape, group) * undone(state, e)
    raise ValueError(name)


# --- a whole replay -------------------------------------------------------------------------------------


def matches(pattern, name):
    """`*` any characters, `?` one, `{a,b}` alternatives."""
    regex, depth = "", 0
    for ch in pattern:
        if ch == "{":
            regex, depth = regex + "(?:", depth + 1
        elif ch == "}":
            regex, depth = regex + ")", depth - 1
        else:
            regex += {"*": ".*", "?": "."}.get(ch, "|" if ch == "," and depth else re.escape(ch))
    return re.fullmatch(regex, name) is not None


def group_of(groups, name, ndim):
    """The first group whose pattern matches and whose rule takes tensors of `ndim` dimensions."""
    for group in groups:
        if matches(group["match"], name) and (ndim >= 2 or group["rule"]["name"] not in MATRIX_RULES):
            return {
                **group,
                "rule": {**RULE_DEFAULTS[group["rule"]["name"]], **group["rule"]},
                "lmo": {**LMO_DEFAULTS, **group.get("lmo", {})},
                "weights": {"format": "f32", "residual": "none", **group.get("weights", {})},
                "state": {"momentum": "f32", "block": 128, **group.get("state", {})},
            }
    raise ValueError(f"no group takes {name}")


def blocks(shape, group):
    """Slices of the tensor, seen as shape[0] x rest, that are one matrix each."""
    rows, cols = shape[0], math.prod(shape[1:])
    split = group.get("split", {})

    def cut(size, parts):
        if isinstance(parts, int):
            parts = [size // parts] * parts
        edges = np.cumsum([0] + list(parts))
        if edges[-1] != size:
            raise ValueError(f"blocks {parts} of {size}")
        return [slice(a, b) for a, b in zip(edges[:-1], edges[1:])]

    if "rows" in split:
        return [(s, slice(0, cols)) for s in cut(rows, split["rows"])]
    if "cols" in split:
        return [(slice(0, rows), s) for s in cut(cols, split["cols"])]
    return [(slice(0, rows), slice(0, cols))]


def mean_gradient(name, tensors):
    """The gradient itself, or the mean of its contributions name@0, name@1, ..."""
    if name in tensors:
        return tensors[name].astype(np.float64)
    parts = []
    while f"{name}@{len(parts)}" in tensors:
        parts.append(tensors[f"{name}@{len(parts)}"].astype(np.float64))
    return sum(parts[1:], parts[0]) / len(parts)


class Replay:
    """Weights and state of every parameter, moved one recorded step at a time.

    Quantized weights start on their grid. Where a step has rounded is in `wide` (W before it) and `u`
    (what decided, if it was stochastic), until the next; of a momentum that rests in bf16 or int8, in
    `wide_momentum` and `u_momentum`.
    """

    def __init__(self, groups, weights, horizon=None):
        self.weights = {k: np.asarray(w, dtype=np.float64).copy() for k, w in weights.items()}
        self.groups = {k: group_of(groups, k, w.ndim) for k, w in self.weights.items()}
        self.state, self.master, self.steps, self.horizon = {}, {}, 0, horizon
        self.wide, self.u = {}, {}
        self.kept = {}  # what else a direction keeps of each block
        self.wide_momentum, self.u_momentum = {}, {}
        for name, w in self.weights.items():
            kind = self.groups[name]["rule"]["name"]
            state = {"momentum": np.zeros_like(w)}
            if kind == "adamw":
                state["second_moment"] = np.zeros_like(w)
            if kind == "normuon":
                lines = sum(n for _, n in self._moments(name, w.shape))
                state["row_second_moment"] = np.zeros(lines)
            self.state[name] = state
            self.master[name] = w.copy()
            weights = self.groups[name]["weights"]
            if weights["format"] in MAGNITUDES:
                self.weights[name] = Grid(weights).start(view_of_rows(w)).reshape(w.shape)
                # The master starts where the weights do, or exactly, as a master of bf16 weights does.
                if weights["residual"] != "master":
                    self.master[name] = self.weights[name]

    def step(self, tensors, seen=None):
        """@param seen  {name: weights} to go on from, in place of one's own rounding: it is not
        continuous, and a tie that fell the other way is a fact from then on.
        @return False when a gradient was not finite: nothing has changed then.
        """
        gradients = {name: mean_gradient(name, tensors) for name in self.weights}
        if not all(np.isfinite(g).all() for g in gradients.values()):
            return False
        self.steps += 1
        self._clip(gradients)
        for name, g in gradients.items():
            group, rule = self.groups[name], self.groups[name]["rule"]
            if rule["name"] in MATRIX_RULES:
                u = self._matrix_direction(name, g, group)
            else:
                u = direction(self.state[name], g, self.steps, group)
            lr, residual = rate(group, self.steps), group["weights"]["residual"]
            w = (1 - lr * rule["weight_decay"]) * self.master[name] - lr * u
            stored = self._rounded(name, w, group["weights"])
            if seen is not None and name in seen:
                stored = seen[name]
            self.weights[name], self.wide[name] = stored, w
            self.master[name] = w if residual == "master" else stored
            self._rest(name, group["state"])
            if residual == "momentum" and rate(group, self.steps + 1) > 0:
                self._pull_back(name, g, w - stored, group)
        return True

    def _rest(self, name, rests):
        """The momentum is rounded after its use, stochastically, in a stream of its own."""
        if rests["momentum"] == "f32":
            return
        grid, wide = momentum_grid(rests), view_of_rows(self.state[name]["momentum"])
        stream = list(self.weights).index(name) | 1 << 32
        u = uniforms(wide.size, stream, self.steps, grid.format).reshape(wide.shape)
        self.wide_momentum[name], self.u_momentum[name] = wide, u
        scale = grid.spread(grid.scales(wide), wide.shape)
        self.state[name]["momentum"] = (grid.rounded(wide / scale, u) * scale).reshape(
            self.weights[name].shape
        )

    def _rounded(self, name, w, weights):
        if weights["format"] not in MAGNITUDES:
            return w
        grid, rows = Grid(weights), view_of_rows(w)
        self.u[name] = None
        if weights.get("rounding") == "stochastic":
            stream = list(self.weights).index(name)
            u = uniforms(w.size, stream, self.steps, grid.format)
            self.u[name] = u.reshape(rows.shape)
        scale = grid.spread(grid.scales(rows), rows.shape)
        return (grid.rounded(rows / scale, self.u[name]) * scale).reshape(w.shape)

    def _pull_back(self, name, g, e, group):
        factor, state = kappa(group, self.steps, self.horizon), self.state[name]
        if group["rule"]["name"] not in MATRIX_RULES:
            take = view_of_rows(correction(state, g, self.steps, group, e, factor))
            take = guarded(take, view_of_rows(state["momentum"]), group, axis=1)
            state["momentum"] = state["momentum"] + take.reshape(g.shape)
            return
        g, e, momentum = view_of_rows(g), view_of_rows(e), view_of_rows(state["momentum"])
        for i, block in enumerate(blocks(state["momentum"].shape, group)):
            part = {**self.kept[name][i], "momentum": momentum[block].copy()}
            take = correction(part, g[block], self.steps, group, e[block], factor)
            momentum[block] += guarded(take, part["momentum"], group)

    def _matrix_direction(self, name, g, group):
        shape, state = g.shape, self.state[name]
        flat = g.reshape(shape[0], -1)
        u = np.zeros_like(flat)
        momentum, moments, at = state["momentum"].reshape(flat.shape), state.get("row_second_moment"), 0
        parts = self._moments(name, shape)
        kept = self.kept.setdefault(name, [{} for _ in parts])
        for (block, lines), part in zip(parts, kept):
            part["momentum"] = momentum[block]
            if moments is not None:
                part["row_second_moment"] = moments[at : at + lines]
            u[block] = direction(part, flat[block], self.steps, group)
            momentum[block] = part["momentum"]
            if moments is not None:
                moments[at : at + lines] = part["row_second_moment"]
            at += lines
        return u.reshape(shape)

    def _moments(self, name, shape):
        """Every block with the number of its second moments: one per row, or per line of the long side."""
        group = self.groups[name]
        long_side = group["rule"].get("axis") == "long"
        return [
            (b, min(b[0].stop - b[0].start, b[1].stop - b[1].start if long_side else math.inf))
            for b in blocks(shape, group)
        ]

    def _clip(self, gradients):
        """Scales the raw gradients of a group to at most `clip_norm`, their norm taken together."""
        for pattern in {g["match"] for g in self.groups.values()}:
            members = [n for n, g in self.groups.items() if g["match"] == pattern]
            limit = self.groups[members[0]].get("clip_norm", 0)
            if not limit:
                continue
            norm = math.sqrt(sum(float((gradients[n] ** 2).sum()) for n in members))
            if norm > limit:
                for n in members:
                    gradients[n] = gradients[n] * (limit / norm)


def error(w, reference, start):
    """||W - W_ref||_F / ||W_ref - W_0||_F."""
    moved = np.linalg.norm(reference - start)
    off = np.linalg.norm(np.asarray(w, dtype=np.float64) - reference)
    return off / moved if moved > 0 else off
