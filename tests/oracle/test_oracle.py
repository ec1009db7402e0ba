"""The oracle against itself: two ways to the same number, and the published error tables."""

import itertools
import os
import tempfile
import unittest

import numpy as np

import oracle


def newton_schulz(x, table, iterations):
    """The iteration as everybody runs it, in float64."""
    polynomials, safety = oracle.TABLES[table]
    x = x / (safety * np.linalg.norm(x))
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for i in range(iterations):
        a, b, c = polynomials[min(i, len(polynomials) - 1)]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


# max |p(x) - 1| on [l, 1] for l = 1e-1, 1e-2, 1e-3, 1e-4: a selection of the published figures.
ERRORS = {
    ("jordan", 5): (0.318, 0.318, 0.530, 0.952),
    ("you5", 5): (0.0318, 0.0318, 0.525, 0.951),
    ("polar_express", 5): (0.1236, 0.1236, 0.1236, 0.898),
    ("polar_express", 6): (1.19e-3, 1.19e-3, 1.19e-3, 0.808),
    ("polar_express_101", 5): (0.130, 0.130, 0.154, 0.903),
    ("polar_express_101", 7): (4.7e-6, 4.7e-6, 9.1e-6, 0.670),
    ("polar_express_105", 5): (0.154, 0.154, 0.271, 0.920),
    ("torch_pe10", 5): (0.131, 0.131, 0.137, 0.900),
    ("dion_pe102", 5): (0.141, 0.141, 0.141, 0.901),
    ("cans", 5): (0.113, 0.113, 0.113, 0.895),
    ("eco8", 8): (7.26e-4, 7.26e-4, 7.26e-4, 9.8e-4),
    ("cubic5", 5): (0.300, 0.300, 0.881, 0.988),
    ("dsv4_10", 10): (5.4e-4, 5.4e-4, 5.4e-4, 2.0e-3),
    ("pade5", 5): (4.2e-3, 0.772, 0.977, 0.998),
    ("pade3", 8): (1.7e-3, 0.748, 0.974, 0.997),
    ("modula", 5): (0.0185, 0.188, 0.759, 0.976),
}


class Oracle(unittest.TestCase):
    def test_the_scalar_polynomial_is_the_matrix_iteration(self):
        rng = np.random.default_rng(1)
        for table in oracle.TABLES:
            for shape in ((9, 17), (12, 12), (17, 9), (1, 7), (7, 1)):
                x = rng.standard_normal(shape)
                recipe = {**oracle.LMO_DEFAULTS, "coefficients": table}
                d = oracle.lmo(x, recipe)
                off = np.abs(d - newton_schulz(x, table, 5)).max()
                # One row or column puts sigma at the top of the tables' range, where an optimal
                # composition is steep (slope 3e4): rounding of 1e-16 comes out as 1e-11.
                self.assertLess(off, 1e-10 if 1 in shape else 1e-12, (table, shape))

    def test_the_gram_matrix_of_shards_is_enough(self):
        """QX, where Q is a polynomial in the sum of the shards' X_r X_r^T: mode gram in exact arithmetic."""
        rng = np.random.default_rng(5)
        for rows, cols, shards in ((9, 17, 3), (12, 12, 5), (1, 7, 4), (17, 9, 2)):
            x = rng.standard_normal((rows, cols))
            polynomials, safety = oracle.TABLES["polar_express_101"]
            pieces = np.array_split(x, shards, axis=1)  # some empty
            gram = sum(p @ p.T for p in pieces)
            r = gram / (safety**2 * np.trace(gram))
            q = np.eye(rows) / (safety * np.sqrt(np.trace(gram)))
            for i in range(5):
                a, b, c = polynomials[min(i, len(polynomials) - 1)]
                z = a * np.eye(rows) + b * r + c * r @ r
                q, r = q @ z, z @ r @ z
            off = np.abs(np.hstack([q @ p for p in pieces]) - oracle.lmo(x, oracle.LMO_DEFAULTS)).max()
            # Eigenvalues of R are squares: rounding of 1e-16 enters as its root times the slope at 0.
            self.assertLess(off, 1e-9 if rows <= cols else 1e-4, (rows, cols))

    def test_tables_have_the_published_errors(self):
        for (table, iterations), row in ERRORS.items():
            for low, printed in zip((1e-1, 1e-2, 1e-3, 1e-4), row):
                x = np.concatenate([np.geomspace(low, 1, 40000), np.linspace(low, 1, 40000)])
                found = np.abs(oracle.composed(x, table, iterations) - 1).max()
                # Half a digit of the printed figure.
                self.assertAlmostEqual(found / printed, 1, delta=0.03, msg=(table, iterations, low))

    def test_the_rational_function_has_the_specified_errors(self):
        printed = {(5e-3, 2): 9.952352e-02, (2e-3, 3): 4.247539e-02, (1e-3, 4): 1.889941e-02}
        for (lower, terms), error in printed.items():
            x = np.geomspace(lower, 1, 50001)
            f = oracle.zolotarev(lower, terms)
            self.assertAlmostEqual(np.abs(f(x) - 1).max() / error, 1, delta=1e-6)
            # Below the interval it decreases to zero.
            self.assertTrue(np.all(np.diff(f(np.linspace(0, lower, 1000))) > 0))

    def test_both_momentum_forms_walk_the_same_way(self):
        rng = np.random.default_rng(2)
        gradients = [{"w": rng.standard_normal((6, 9))} for _ in range(20)]
        ends = []
        for form in ("ema", "heavy_ball"):
            group = {"match": "*", "rule": {"name": "muon", "lr": 0.1, "momentum_form": form}}
            replay = oracle.Replay([group], {"w": np.zeros((6, 9))})
            for g in gradients:
                self.assertTrue(replay.step(g))
            ends.append(replay.weights["w"])
        self.assertLess(np.abs(ends[0] - ends[1]).max(), 1e-11)

    def test_normuon_evens_out_the_rows(self):
        x = np.random.default_rng(3).standard_normal((5, 11))
        group = oracle.group_of([{"match": "*", "rule": {"name": "normuon", "beta2": 0.9}}], "w", 2)
        state = {"momentum": np.zeros_like(x), "row_second_moment": np.zeros(5)}
        u = direction_of(state, x, group)
        d = oracle.lmo(x, group["lmo"])
        rows = np.linalg.norm(u, axis=1)
        self.assertAlmostEqual(np.linalg.norm(u), np.linalg.norm(d), 9)
        self.assertLess(np.ptp(rows), 1e-7)  # eps over the root of a row's second moment

    def test_adamw_walks_at_the_rate_under_a_constant_gradient(self):
        g = np.array([[3.0, -2.0], [1e-3, -1e6]])
        group = {"match": "*", "rule": {"name": "adamw", "lr": 0.5, "eps": 0.0}}
        replay = oracle.Replay([group], {"w": np.zeros((2, 2))})
        for _ in range(7):
            replay.step({"w": g})
        self.assertLess(np.abs(replay.weights["w"] + 7 * 0.5 * np.sign(g)).max(), 1e-12)

    def test_contributions_are_averaged_and_bad_steps_skipped(self):
        group = {"match": "*", "rule": {"name": "sgd", "lr": 1.0, "momentum": 0.0}}
        replay = oracle.Replay([group], {"w": np.zeros(3)})
        self.assertTrue(replay.step({"w@0": np.array([1.0, 2, 3]), "w@1": np.array([3.0, 2, 1])}))
        self.assertFalse(replay.step({"w": np.array([1.0, np.nan, 1])}))
        self.assertEqual(replay.weights["w"].tolist(), [-2, -2, -2])
        self.assertEqual(replay.steps, 1)

    def test_patterns(self):
        self.assertTrue(oracle.matches("layers.*.{attn,mlp}.*.weight", "layers.0.mlp.up.weight"))
        self.assertFalse(oracle.matches("layers.*.{attn,mlp}.*.weight", "layers.0.norm.weight"))
        self.assertTrue(oracle.matches("a?c.*", "abc.d.e"))

    def test_files_come_back(self):
        rng = np.random.default_rng(4)
        tensors = {
            "a": rng.standard_normal((3, 5)).astype("f4"),
            "b": oracle.round_bf16(rng.standard_normal(7)).astype("f4"),
            "s": np.float32(2.5).reshape(()),
        }
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.safetensors")
            oracle.write_safetensors(path, tensors, {"k": "v"}, bf16=("b",))
            back, metadata = oracle.read_safetensors(path)
        self.assertEqual(metadata, {"k": "v"})
        for name, array in tensors.items():
            self.assertTrue(np.array_equal(array, back[name]), name)

    def test_bf16_rounds_to_even(self):
        one, ulp = 1.0, 2.0**-7
        self.assertEqual(oracle.round_bf16(np.array([one + ulp / 2]))[0], one)
        self.assertEqual(oracle.round_bf16(np.array([one + 1.5 * ulp]))[0], one + 2 * ulp)

    def test_small_floats_are_the_specified_ones(self):
        # (how many numbers >= 0, smallest > 0, smallest with a full mantissa, largest)
        for name, row in {
            "fp8_e4m3": (127, 2.0**-9, 2.0**-6, 448.0),
            "fp8_e5m2": (124, 2.0**-16, 2.0**-14, 57344.0),
        }.items():
            v = oracle.MAGNITUDES[name]
            steps = 8 if name == "fp8_e4m3" else 4
            self.assertEqual((len(v), v[1], v[steps], v[-1]), row)
            # ulp(z) = 2^(max(floor(log2 z), smallest exponent) - mantissa bits)
            ulp = 2.0 ** (np.floor(np.log2(np.maximum(v[1:-1], row[2]))) - np.log2(steps))
            self.assertTrue(np.array_equal(np.diff(v)[1:], ulp))

    def test_codes_are_read_as_they_are_packed(self):
        grid = oracle.Grid({"format": "int4"})
        packed = np.array([[0x2F, 0x09], [0x81, 0x07]], dtype="u1")  # low nibble first, the last empty
        self.assertTrue(
            np.array_equal(grid.decode(packed, (2, 3)), [[-1, 2, -7], [1, np.nan, 7]], equal_nan=True)
        )
        with self.assertRaises(oracle.FileError):
            grid.decode(packed | 0x10, (2, 3))
        codes = np.array([[0x00, 0x01, 0x7E, 0xFE, 0x7F, 0xFF, 0x80]], dtype="u1")
        e4m3 = oracle.Grid({"format": "fp8_e4m3"}).decode(codes, codes.shape)[0]
        self.assertTrue(np.array_equal(e4m3, [0, 2.0**-9, 448, -448] + 3 * [np.nan], equal_nan=True))

    def test_rounding_takes_the_nearest_or_the_drawn_neighbour(self):
        rng = np.random.default_rng(6)
        for name, values in oracle.MAGNITUDES.items():
            if name == "bf16":
                continue
            grid = oracle.Grid({"format": name})
            both = np.concatenate([-values[:0:-1], values])
            z = rng.uniform(-1, 1, 400) * values[-1] * 2.0 ** rng.integers(-8, 1, 400)
            near = grid.rounded(z)
            distance = np.abs(z[:, None] - both)
            self.assertTrue(np.array_equal(np.abs(z - near), distance.min(axis=1)), name)
            ties = (values[:-1] + values[1:]) / 2
            even = np.where(np.arange(len(ties)) % 2 == 0, values[:-1], values[1:])
            self.assertTrue(np.array_equal(grid.rounded(-ties), -even), name)
            # The mean of all that u draws is z itself, to the spacing of the u.
            u = (np.arange(1000) + 0.5) / 1000
            mean = np.array([grid.rounded(np.full(1000, x), u).mean() for x in z[:50]])
            self.assertLess((np.abs(mean - z[:50]) / np.diff(values).max()).max(), 1e-3, name)
            one = np.ones(len(z))
            self.assertEqual(grid.excess(z[:, None], near[:, None], one).max(), 0)
            place, d = grid.cell(z)
            other = np.copysign(values[place + (d <= 0.5)], z)  # z is past the middle by half of the rest
            past = (np.abs(z - other) - np.abs(z - near)) / 2
            found = grid.excess(z[:, None], other[:, None], one)[:, 0]
            self.assertLess(np.abs(found - past).max(), 1e-12 * values[-1], name)

    def test_philox_has_the_published_words(self):
        ones = 0xFFFFFFFF
        for counter, key, words in (
            ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ):
            self.assertEqual([int(w) for w in oracle.philox(counter, key)], words)

    def test_phi_moves_as_without_rounding(self):
        rng = np.random.default_rng(7)
        gradients = [{"w": rng.standard_normal((6, 9))} for _ in range(200)]
        start = {"w": rng.standard_normal((6, 9))}
        cosine = {"schedule": {"kind": "cosine", "warmup_steps": 20, "decay_steps": 200, "final": 0.1}}
        for decay, nesterov, (kind, rest, met) in itertools.product(
            (0.0, 0.5),
            (False, True),
            (("exact", {}, 1), ("exact_schedule", cosine, 1), ("exact", cosine, 0), ("blog", {}, 0)),
        ):
            rule = {"name": "sgd", "lr": 0.1, "weight_decay": decay, "nesterov": nesterov}
            eco = {"format": "int4", "residual": "momentum", "eco": {"kappa": kind}}
            group = {"match": "*", "rule": rule, "weights": eco, **rest}
            rounded = oracle.Replay([group], start, 200)
            free = oracle.Replay([{**group, "weights": {}}], rounded.weights)
            for g in gradients:
                rounded.step(g)
                free.step(g)
            s = oracle.returns(rounded.groups["w"], 201, 200)
            phi, want = (r.weights["w"] - s * r.state["w"]["momentum"] for r in (rounded, free))
            off = np.abs(phi - want).max()
            if met or (kind == "blog" and decay == 0):  # where both are one
                self.assertLess(off, 1e-12, (decay, nesterov, kind))
            else:
                self.assertGreater(off, 1e-3, (decay, nesterov, kind))

    def test_what_undoes_a_direction_keeps_all_of_the_error(self):
        rng = np.random.default_rng(8)
        recipe = {**oracle.LMO_DEFAULTS, "coefficients": "eco8", "iterations": 8}
        for shape in ((9, 17), (17, 9)):
            x, e = rng.standard_normal(shape), rng.standard_normal(shape)
            c = oracle.inverse_lmo(x, recipe, e)
            u, sigma, vt = np.linalg.svd(x, full_matrices=False)
            back = (u / sigma) @ u.T @ c if shape[0] < shape[1] else c @ (vt.T / sigma) @ vt
            # |p - 1| <= 7.26e-4 on [1e-3, 1]
            self.assertLess(np.linalg.norm(back - e), 1e-3 * np.linalg.norm(e), shape)


SHAPES = ((9, 17), (17, 9), (12, 12), (1, 7), (7, 1))


def of_rule(name, **rule):
    """Directions of a rule in step 1, 2, ... of the gradients given, the last with its state."""
    lmo = rule.pop("lmo", {})
    group = oracle.group_of([{"match": "*", "rule": {"name": name, **rule}, "lmo": lmo}], "w", 2)
    group["lmo"]["scale"] = "spectral"

    def run(gradients):
        state = {"momentum": np.zeros_like(gradients[0])}
        return [oracle.direction(state, g, t + 1, group) for t, g in enumerate(gradients)], state

    return run


def msign(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


class Prism(unittest.TestCase):
    def test_is_a_block_of_the_stack_as_everybody_iterates_it(self):
        rng = np.random.default_rng(21)
        for rows, cols in SHAPES:
            gradients = [rng.standard_normal((rows, cols)) for _ in range(3)]
            m = 0.1 * (gradients[2] + 0.9 * gradients[1] + 0.81 * gradients[0])
            n = gradients[2] - m
            for side in ("left", "right", "short", "long"):
                d = of_rule("prism", momentum=0.9, gamma=0.7, side=side)(gradients)[0][-1]
                beside = {"left": True, "right": False, "short": rows <= cols, "long": rows > cols}[side]
                z = (np.hstack if beside else np.vstack)([m, 0.7 * n])
                want = newton_schulz(z, "polar_express_101", 5)[:rows, :cols]
                self.assertLess(np.abs(d - want).max(), 1e-10, (rows, cols, side))

    def test_is_the_published_root(self):
        rng, exact = np.random.default_rng(22), {"coefficients": "eco8", "iterations": 8}
        gradients = [rng.standard_normal((6, 40)) for _ in range(2)]
        for side in ("left", "right"):
            run = of_rule("prism", momentum=0.5, gamma=1.5, side=side, lmo=exact)
            d, state = run(gradients)
            m = state["momentum"]
            n = 1.5 * (gradients[1] - m)
            p = m @ m.T + n @ n.T if side == "left" else m.T @ m + n.T @ n
            values, vectors = np.linalg.eigh(p)
            good = values > 1e-12 * values[-1]
            root = (vectors[:, good] / np.sqrt(values[good])) @ vectors[:, good].T
            want = root @ m if side == "left" else m @ root
            # |p - 1| <= 7.26e-4 on [1e-3, 1]
            self.assertLess(np.linalg.norm(d[1] - want), 1e-3 * np.linalg.norm(want), side)
            e = rng.standard_normal(m.shape)
            root = (vectors[:, good] * np.sqrt(values[good])) @ vectors[:, good].T
            want = root @ e if side == "left" else e @ root
            self.assertLess(np.linalg.norm(oracle.undone(state, e) - want), 1e-3 * np.linalg.norm(want))

    def test_damps_the_first_step_or_does_not(self):
        g = np.random.default_rng(23).standard_normal((5, 8))
        # Muon's direction / sqrt(1 + (gamma b / (1-b))^2): 0.0526 with 0.95 and 1.
        exact = {"coefficients": "eco8", "iterations": 8}
        for name in ("prism", "bidirectional_prism"):
            rest = {"eps": 0.0} if name != "prism" else {}
            for damps, length in ((True, 0.0526), (False, 1.0)):
                d = of_rule(name, damp_first_step=damps, lmo=exact, **rest)([g])[0][0]
                self.assertLess(np.abs(d - length * msign(g)).max(), 1e-3 * length, (name, damps))

    def test_of_both_sides_by_matrices_of_the_short_side_only(self):
        rng = np.random.default_rng(24)
        for rows, cols in SHAPES:
            gradients = [rng.standard_normal((rows, cols)) for _ in range(2)]
            rule = {"momentum": 0.6, "gamma_left": 0.5, "gamma_right": 2.0, "eps": 1e-3}
            d, state = of_rule("bidirectional_prism", **rule)(gradients)
            x, n = state["momentum"], gradients[1] - state["momentum"]
            near, far = (0.5, 2.0) if rows <= cols else (2.0, 0.5)
            x, n, d = (x, n, d[1]) if rows <= cols else (x.T, n.T, d[1].T)
            z = np.vstack([x, far * n])
            m, k = len(x), z @ z.T

            def delta(p):
                return 1e-3 * np.trace(p) / m + 2.0**-23 * np.linalg.norm(p)

            own = x @ x.T + near**2 * n @ n.T
            left = oracle.power(own + delta(own) * np.eye(m), -0.25)
            want = left @ (oracle.power(k + delta(k) * np.eye(2 * m), -0.25) @ z)[:m]
            self.assertLess(np.abs(d - want).max(), 1e-12, (rows, cols))
            e = rng.standard_normal((rows, cols))
            back = oracle.power(state["undo"][0], -1.0) @ oracle.undone(state, e)
            back = back @ oracle.power(state["undo"][1], -1.0)
            self.assertLess(np.abs(back - e).max(), 1e-9)

    def test_no_direction_is_longer_than_one_nor_depends_on_the_scale(self):
        rng = np.random.default_rng(25)
        for _ in range(300):
            shape, gammas = rng.integers(1, 9, 2), 10.0 ** rng.uniform(-3, 2, 2)
            gradients = [rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2) for _ in range(2)]
            run = of_rule("bidirectional_prism", gamma_left=gammas[0], gamma_right=gammas[1])
            d = run(gradients)[0][-1]
            self.assertLess(np.linalg.norm(d, 2), 1 + 1e-12)
            large = run([1e20 * g for g in gradients])[0][-1]
            self.assertLess(np.abs(large - d).max(), 1e-8)

    def test_more_gamma_damps_every_singular_value_more(self):
        rng = np.random.default_rng(26)
        gradients, before = [rng.standard_normal((6, 15)) for _ in range(3)], np.full(6, 2.0)
        exact = {"coefficients": "eco8", "iterations": 8}
        muon = of_rule("muon", momentum=0.9, nesterov=False, lmo=exact)(gradients)[0][-1]
        for gamma in (0.0, 0.3, 1.0, 3.0, 10.0):
            d = of_rule("prism", momentum=0.9, gamma=gamma, lmo=exact)(gradients)[0][-1]
            sigma = np.linalg.svd(d, compute_uv=False)
            self.assertTrue(np.all(sigma < before), gamma)
            if gamma == 0:
                self.assertLess(np.abs(d - muon).max(), 1e-12)
            before = sigma


KRONECKER = {
    "shampoo": {"bias_correction": False},
    "one_sided_shampoo": {"eps": 1e-12},
    "kl_shampoo": {},
    "soap": {"eps": 1e-3},
}


class Kronecker(unittest.TestCase):
    def test_without_memory_all_but_kl_are_muon(self):
        rng = np.random.default_rng(31)
        left, right = orthogonal(rng, 6), orthogonal(rng, 6)
        g = (left * np.arange(1.0, 7.0)) @ right
        before = rng.standard_normal((6, 6))
        for name, rule in (
            ("shampoo", {"momentum": 0.0, "beta2": 0.0, "frequency": 1}),
            ("one_sided_shampoo", {"momentum": 0.0, "beta2": 0.0, "frequency": 1}),
            ("soap", {"betas": [0.0, 0.0], "shampoo_beta": 0.0, "frequency": 1}),
        ):
            gradients = [g] if name == "soap" else [before, g]  # one iteration is no eigh
            d = of_rule(name, **rule)(gradients)[0][-1]
            self.assertLess(np.abs(d - msign(g)).max(), 1e-6, name)

    def test_soap_without_bases_is_adam(self):
        rng = np.random.default_rng(32)
        gradients = [rng.standard_normal((4, 7)) for _ in range(6)]
        found = of_rule("soap", max_dimension=3, betas=[0.8, 0.9])(gradients)[0]
        group = oracle.group_of([{"match": "*", "rule": {"name": "adamw", "betas": [0.8, 0.9]}}], "w", 2)
        state = {"momentum": np.zeros((4, 7)), "second_moment": np.zeros((4, 7))}
        for t, (g, d) in enumerate(zip(gradients, found)):
            self.assertLess(np.abs(d - oracle.direction(state, g, t + 1, group)).max(), 1e-12)

    def test_turns_with_its_gradients(self):
        rng = np.random.default_rng(33)
        for rows, cols in ((8, 8), (6, 7)):
            gradients = [rng.standard_normal((rows, cols)) for _ in range(5)]
            a, b = orthogonal(rng, rows), orthogonal(rng, cols)
            for name, rule in KRONECKER.items():
                run = of_rule(name, **rule)
                plain, turned = run(gradients)[0], run([a @ g @ b for g in gradients])[0]
                for d, other in zip(plain, turned):
                    self.assertLess(np.abs(a @ d @ b - other).max(), 1e-7, name)

    def test_the_size_of_gradients_does_not_matter(self):
        rng = np.random.default_rng(34)
        gradients = [rng.standard_normal((6, 7)) for _ in range(4)]
        for name, rule in KRONECKER.items():
            # SOAP's eps goes along: without it the zeros of the first step would be steps of any sign.
            large = {**rule, "eps": 1.0} if name == "soap" else rule
            plain = of_rule(name, **rule)(gradients)[0]
            for d, other in zip(plain, of_rule(name, **large)([1e3 * g for g in gradients])[0]):
                self.assertLess(np.abs(d - other).max(), 1e-6, name)

    def test_what_undoes_a_direction(self):
        rng = np.random.default_rng(35)
        for rows, cols in ((6, 9), (9, 6), (7, 7)):
            gradients = [rng.standard_normal((rows, cols)) for _ in range(4)]
            grafted = {"grafting": "adam"}
            for name, rule in (*KRONECKER.items(), ("shampoo", grafted)):
                d, state = of_rule(name, **rule)(gradients)
                off = np.abs(oracle.undone(state, d[-1]) - state["momentum"]).max()
                self.assertLess(off, 1e-8, (name, rule))

    def test_kl_shampoo_whitens_both_sides(self):
        """Of gradients A X B the factors become AA^T and B^T B, but for a number: what D sees is X."""
        rng = np.random.default_rng(36)
        a, b = np.diag(np.geomspace(1, 4, 4)), np.diag(np.geomspace(1, 0.2, 5))
        gradients = [a @ rng.standard_normal((4, 5)) @ b for _ in range(4000)]
        state = of_rule("kl_shampoo", beta2=0.998, momentum=0.0)(gradients)[1]
        for key, want in (("left", a @ a), ("right", b @ b)):
            found = state[key] / np.trace(state[key]) * np.trace(want)
            # Means of some 500 times 4 products, and of the beginning 0.998^4000 is left.
            scaled = np.linalg.inv(np.sqrt(want)) @ found @ np.linalg.inv(np.sqrt(want))
            scaled *= len(want) / np.trace(scaled)
            self.assertLess(np.abs(scaled - np.eye(len(want))).max(), 0.1, key)

    def test_a_graft_is_as_long_as_adams_step(self):
        rng = np.random.default_rng(37)
        gradients = [rng.standard_normal((5, 8)) for _ in range(4)]
        found = of_rule("shampoo", grafting="adam", grafting_eps=1e-8)(gradients)[0]
        group = oracle.group_of([{"match": "*", "rule": {"name": "adamw", "betas": [0.9, 0.999]}}], "w", 2)
        state = {"momentum": np.zeros((5, 8)), "second_moment": np.zeros((5, 8))}
        for t, (g, d) in enumerate(zip(gradients, found)):
            adam = oracle.direction(state, g, t + 1, group)
            self.assertAlmostEqual(np.linalg.norm(d) / np.linalg.norm(adam), 1, 12)

    def test_roots_are_renewed_in_their_turn(self):
        rng = np.random.default_rng(38)
        gradients = [rng.standard_normal((5, 5)) for _ in range(7)]
        often = of_rule("one_sided_shampoo", frequency=1)(gradients)[0]
        seldom = of_rule("one_sided_shampoo", frequency=3)(gradients)[0]
        same = [np.abs(a - b).max() < 1e-12 for a, b in zip(often, seldom)]
        self.assertEqual(same, [True, True, True, False, False, True, False])


def direction_of(state, x, group):
    """One direction from a state that has not moved: momentum 0 makes X a multiple of x."""
    return oracle.direction(state, x, 1, group)


if __name__ == "__main__":
    unittest.main()
