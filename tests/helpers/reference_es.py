"""Evolution strategies, plainly: one process, whole tensors, transformers' ``generate``.

Of shardes it takes the definition of the noise and nothing else. What it is told has the names of the keys.
"""

import functools
import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardes.noise import Region, data_order
from shardes.noise.kinds.registry import make_kind
from tests.helpers.noise_oracle import accumulated, added, covered, noise_at
from tests.helpers.update_oracle import power

f32 = np.float32
sqrt = np.sqrt  # of NumPy, which is correctly rounded; torch's is not
eps_at = functools.lru_cache(maxsize=None)(noise_at)  # the same for many runs


class ReferenceES:
    def __init__(self, model_dir, rows, reward, *, batch_size, max_new_tokens, dtype=torch.float32, **es):
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        self.rows, self.reward, self.batch_size, self.max_new_tokens = (
            rows,
            reward,
            batch_size,
            max_new_tokens,
        )
        self.kind = make_kind(es["noise"], rank=es["rank"], num_parts=es["subspaces"])
        self.es, self.parameters = es, dict(sorted(self.model.named_parameters()))
        self.base = {name: p.detach().flatten().clone() for name, p in self.parameters.items()}
        self.masters = {name: values.clone() for name, values in self.base.items()}
        self.states = {name: [torch.zeros(len(v)), torch.zeros(len(v))] for name, v in self.base.items()}

    def region(self, name):
        size = len(self.base[name])
        shape = tuple(self.parameters[name].shape)
        return Region(list(self.parameters).index(name), size, 0, size, shape=shape)

    @torch.no_grad()
    def answers(self, prompts):
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
        output = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def rewards(self, rows, *, iteration, direction, sigma):
        for name, p in self.parameters.items():
            address = {"kind": self.kind, "seed": 0, "iteration": iteration, "direction": direction}
            centre, region = self.masters[name].to(p.dtype), self.region(name)
            step = f32(sigma) * self.kind.part_scale * eps_at(region, **address)
            moved = (centre.float() + torch.from_numpy(step)).to(p.dtype)
            p.copy_(torch.where(torch.from_numpy(covered(region, **address)), moved, centre).view(p.shape))
        prompts = [row["prompt"] for row in rows]
        return self.reward(prompts, self.answers(prompts))

    def iterate(self, t):
        es = self.es
        shapes = {
            "constant": 1.0,
            "linear": 1 - t / es["iterations"],
            "cosine": (1 + math.cos(math.pi * t / es["iterations"])) / 2,
        }
        sigma = es["sigma"]
        if es["final_sigma"] and t:
            sigma = es["final_sigma"] + (sigma - es["final_sigma"]) * shapes[es["sigma_schedule"]]
        alpha = (sigma / 2 if es["alpha"] == "auto" else es["alpha"]) * shapes[es["alpha_schedule"]]
        alpha *= min(1, (t + 1) / (es["warmup_iterations"] + 1))
        population = es["population"]
        if isinstance(population, dict):
            population = population[max(first for first in population if first <= t)]
        noise_iteration = t - t % es["noise_reuse"]
        batch = [self.rows[i] for i in data_order(len(self.rows), seed=0, iteration=t, count=self.batch_size)]
        table = []
        for n in range(population):
            direction, sign = (n // 2, 1 - 2 * (n % 2)) if es["antithetic"] else (n, 1)
            count = es["prompts_per_member"] or len(batch)
            seen = [(direction * count + i) % len(batch) for i in range(count)]
            values = self.rewards(
                [batch[i] for i in seen], iteration=noise_iteration, direction=direction, sigma=sign * sigma
            )
            table.append(dict(zip(seen, values, strict=True)))
        if es["step_rule"] == "reliability":
            alpha *= self.root_of_reliability(table)
        z = self.shape(table)
        again = self.members_again() if es["member_reuse"] is not None and t else []
        num_effective = sum(w for w, _ in again) ** 2 / sum(w * w for w, _ in again) if again else 0
        scale = (1.0 if es["optimizer"] == "adam" else alpha) / (population + num_effective)
        total = sum(w for w, _ in again)
        centre = math.fsum(w * r for w, r in again) / total if again else 0
        groups = [z, [num_effective * (w / total) * (r - centre) for w, r in again]]
        if es["antithetic"]:
            groups = [[plus - minus for plus, minus in zip(g[::2], g[1::2], strict=True)] for g in groups]
        groups = [[float(f32(scale * value)) for value in group] for group in groups]
        num_weights = sum(map(len, self.base.values()))
        norm = math.sqrt(num_weights * math.fsum(v * v for group in groups for v in group))
        if es["max_update_norm"] and norm > es["max_update_norm"]:
            groups = [[float(f32(v * (es["max_update_norm"] / norm))) for v in group] for group in groups]
        self.last = z, groups[0], sigma
        for name in self.parameters:
            self.step(name, groups, alpha=alpha, t=t, noise_iteration=noise_iteration)

    def root_of_reliability(self, table):
        """By the two-way analysis of variance, averaged over the last eight iterations."""
        layout = np.array([[row[p] for p in sorted(row)] for row in table])
        n, m = layout.shape
        rows, columns = layout.mean(1, keepdims=True), layout.mean(0)
        members = m * rows.var() * n / (n - 1)
        rest = ((layout - rows - columns + layout.mean()) ** 2).sum() / ((n - 1) * (m - 1))
        square = float(f"{math.sqrt(members / rest):.6g}") ** 2
        self.shares = [*getattr(self, "shares", []), square / (1 + square)][-8:]
        return max(0.1, math.sqrt(max(0.0, 2 - len(self.shares) / math.fsum(self.shares))))

    def members_again(self):
        """Weight and shaped reward of each member of the last iteration."""
        z, c, sigma = self.last
        if not any(z):
            return []
        num_weights = sum(map(len, self.base.values()))
        signs = [1, -1] if self.es["antithetic"] else [1]
        logs = np.array([sign * num_weights * value / sigma for value in c for sign in signs])
        logs -= logs.max()

        def is_enough(power):
            w = np.exp(power * logs)
            return w.sum() ** 2 / (w * w).sum() >= self.es["member_reuse"] * len(z)

        power = float(is_enough(1.0))
        for digit in range(1, 60 if power < 1 else 1):  # binary ones
            power += is_enough(power + 2.0**-digit) * 2.0**-digit
        return list(zip(np.exp(power * logs).tolist(), z, strict=True))

    def shape(self, table):
        es, means = self.es, [math.fsum(row.values()) / len(row) for row in table]
        centre = math.fsum(means) / len(means)
        z = means
        if es["shaping"] == "zscore":
            deviation = math.sqrt(math.fsum((r - centre) ** 2 for r in means) / len(means))
            z = [(r - centre) / (deviation + 1e-8) for r in means]
        elif es["shaping"] == "centered_rank":
            z = [
                (sum(o < r for o in means) - sum(o > r for o in means)) / (2 * (len(means) - 1))
                for r in means
            ]
        elif es["shaping"] == "per_prompt":
            by_prompt = {p: [row[p] for row in table if p in row] for row in table for p in row}
            centred = [
                [r - math.fsum(by_prompt[p]) / len(by_prompt[p]) for p, r in row.items()] for row in table
            ]
            every = [value for row in centred for value in row]
            middle = math.fsum(every) / len(every)
            deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in every) / len(every)) + 1e-8
            z = [math.fsum(row) / len(row) / deviation for row in centred]
        limit = es["clip_shaped"] or math.inf
        return [max(-limit, min(limit, value)) for value in z]

    def step(self, name, groups, *, alpha, t, noise_iteration):
        es, master, (m, v) = self.es, self.masters[name], self.states[name]
        address = {"region": self.region(name), "seed": 0}
        step = torch.zeros(len(master))
        for c, iteration in zip(groups, (noise_iteration, t - 1), strict=True):
            if c:
                step = accumulated(
                    step,
                    coefficients=c,
                    directions=range(len(c)),
                    kind=self.kind,
                    iteration=iteration,
                    **address,
                )
        if es["optimizer"] == "momentum":
            m[:] = m * es["momentum"] + step
            step = m.clone()
        elif es["optimizer"] == "adam":
            (b1, b2), g = es["adam_betas"], step
            m[:] = m * b1 + g * (1 - b1)
            v[:] = v * b2 + g * g * (1 - b2)
            first, second = (float(f32(1 / (1 - power(b, t + 1)))) for b in (b1, b2))
            root = torch.from_numpy(sqrt((v * second).numpy())) + es["adam_epsilon"]
            step = m * first / root * alpha
        if es["weight_decay"]:
            away = master.float() - (self.base[name].float() if es["decay_towards"] == "base" else 0)
            step = step - away * (alpha * es["weight_decay"])
        self.masters[name] = added(master, step, iteration=t, **address)
