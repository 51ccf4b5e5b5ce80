"""AMC: reinforcement learning sets the part that each layer keeps (He, Lin, Liu, Wang, Li, Han 2018).

An episode walks over the layers; the agent (DDPG) sees where it is and says how much of the layer stays. The action
wall cuts the action so that the budget can still be met with all later layers at their least, so every sequence of
actions keeps it (section 3.2). After the last layer the network is scored once; the reward goes to every step.

Where we differ: the wall searches counts of channels by the network's real cost, which knows that a layer's cost hangs
on both its inputs and its outputs; scores are written into the run's journal, so a search that was stopped goes on with
the same actions and asks for no score twice. `RandomSearch` is the control: the same wall and as many episodes, but no
agent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.display import best_so_far, progress
from tersenet.journal import Journal
from tersenet.task import one_thread


@dataclass(frozen=True)
class Problem:
    """What is to be decided: layers of some size, described by `features` [layers, any], and what a choice costs.

    `cost` and `score` take the part that each layer keeps; the cost may be `most`, a score is better when larger.
    """

    sizes: tuple[int, ...]
    features: tuple[tuple[float, ...], ...]
    cost: Callable[[Sequence[float]], float]
    most: float
    score: Callable[[Sequence[float]], float]

    def least(self, part: float, begin: int = 0) -> list[float]:
        """The parts of the layers from `begin` on when each keeps as little as it may: one channel at least."""
        return [max(1, math.ceil(part * n)) / n for n in self.sizes[begin:]]

    def check(self, part: float) -> None:
        smallest = self.cost(self.least(part))
        if smallest > self.most:
            raise ValueError(
                f"a cost of {self.most:,.0f} cannot be met: {part:.0%} of every layer cost {smallest:,.0f}"
            )


def walled(action: float, ratios: Sequence[float], problem: Problem, part: float) -> float:
    """The next layer's action, cut so that the cost can be met with all later layers at their least `part`."""
    at, size = len(ratios), problem.sizes[len(ratios)]
    low = max(1, math.ceil(part * size))
    high = min(max(round(action * size), low), size)
    rest = problem.least(part, at + 1)

    def meets(count: int) -> bool:
        return problem.cost([*ratios, count / size, *rest]) <= problem.most

    if meets(high):
        return high / size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low / size


@dataclass(frozen=True)
class RandomSearch:
    """Uniformly random parts behind the action wall; the best of `episodes`."""

    episodes: int = 100
    least: float = 0.2
    seed: int = 0

    def allocate(self, problem: Problem, journal: Journal | None = None, key: str = "") -> list[float]:
        """The parts with the best score; raises ValueError where even the least parts cost too much."""
        problem.check(self.least)
        generator, score = np.random.default_rng(self.seed), Scores(problem, journal or Journal(), key)
        tried: list[tuple[float, list[float]]] = []
        for _ in progress(range(self.episodes), "random search", self.episodes):
            ratios: list[float] = []
            for _ in problem.sizes:
                ratios.append(walled(float(generator.uniform(self.least, 1)), ratios, problem, self.least))
            tried.append((score(ratios), ratios))
            best_so_far(-tried[-1][0], f"score {tried[-1][0]:.5g}")
        return max(tried, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class AMC:
    """Search with DDPG: `warmup` episodes at random, then the actor's actions with noise that fades.

    `guarantee` takes the reward -(1 - score) log(cost) instead of the score, which asks for accuracy first.
    """

    episodes: int = 100
    warmup: int = 25
    least: float = 0.2
    noise: float = 0.5
    fade: float = 0.95
    guarantee: bool = False
    seed: int = 0

    def allocate(self, problem: Problem, journal: Journal | None = None, key: str = "") -> list[float]:
        """The parts with the best reward; raises ValueError where even the least parts cost too much."""
        problem.check(self.least)
        generator, score = np.random.default_rng(self.seed), Scores(problem, journal or Journal(), key)
        tried: list[tuple[float, list[float]]] = []
        with one_thread():
            agent = Agent(len(problem.features[0]) + 3, len(problem.sizes), self.seed)
            for episode in progress(range(self.episodes), "AMC", self.episodes):
                spread = None if episode < self.warmup else self.noise * self.fade ** (episode - self.warmup)
                ratios: list[float] = []
                states: list[Tensor] = []
                for _ in problem.sizes:
                    states.append(_state(problem, ratios))
                    action = agent.action(states[-1], spread, self.least, generator)
                    ratios.append(walled(action, ratios, problem, self.least))
                reward = score(ratios)
                if self.guarantee:
                    reward = -(1 - reward) * math.log(max(problem.cost(ratios), 2.0))
                tried.append((reward, ratios))
                best_so_far(-reward, f"reward {reward:.5g}")
                agent.learn(states, ratios, reward, train=spread is not None)
        return max(tried, key=lambda pair: pair[0])[1]


def _state(problem: Problem, ratios: Sequence[float]) -> Tensor:
    """The layer's features with the part of the cost that is saved, that is still to come, and the last action."""
    rest = [1.0] * (len(problem.sizes) - len(ratios))
    whole, here = problem.cost([1.0] * len(problem.sizes)), problem.cost([*ratios, *rest])
    left = here - problem.cost([*ratios, *problem.least(0.0, len(ratios))])
    return torch.tensor([*problem.features[len(ratios)], 1 - here / whole, left / whole, ratios[-1] if ratios else 1.0])


class Scores:
    """Scores of sequences of parts, written into a journal under the search's key so that none is asked for twice."""

    def __init__(self, problem: Problem, journal: Journal, key: str) -> None:
        self.score, self.journal, self.key = problem.score, journal, key
        self.found = {tuple(row["ratios"]): float(row["score"]) for row in journal.find(search=key)}

    def __call__(self, ratios: Sequence[float]) -> float:
        parts = tuple(round(r, 6) for r in ratios)
        if parts not in self.found:
            self.found[parts] = self.score(ratios)
            self.journal.write(search=self.key, ratios=list(parts), score=self.found[parts])
        return self.found[parts]


class Agent:
    """DDPG: an actor and a critic with two hidden layers of 300, their slow copies, and a memory of steps."""

    def __init__(self, features: int, layers: int, seed: int) -> None:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            self.actor, self.critic = _network(features, nn.Sigmoid()), _network(features + 1, nn.Identity())
            self.slow = _network(features, nn.Sigmoid()), _network(features + 1, nn.Identity())
        for slow, fast in zip(self.slow, (self.actor, self.critic), strict=True):
            slow.load_state_dict(fast.state_dict())
        self.steps = torch.optim.Adam(self.actor.parameters(), 1e-4), torch.optim.Adam(self.critic.parameters(), 1e-3)
        self.memory: list[tuple[Tensor, Tensor, Tensor, float, bool]] = []
        self.size, self.layers, self.average = 100 * layers, layers, math.nan
        self.draw = torch.Generator().manual_seed(seed)

    def action(self, state: Tensor, spread: float | None, least: float, generator: np.random.Generator) -> float:
        if spread is None:
            return float(generator.uniform(least, 1))
        with torch.no_grad():
            middle = float(self.actor(state[None])[0, 0])
        for _ in range(100):  # a truncated normal
            drawn = float(generator.normal(middle, spread))
            if least <= drawn <= 1:
                return drawn
        return min(max(middle, least), 1.0)

    def learn(self, states: list[Tensor], actions: Sequence[float], reward: float, train: bool) -> None:
        self.average = reward if math.isnan(self.average) else 0.95 * self.average + 0.05 * reward
        for k, (state, action) in enumerate(zip(states, actions, strict=True)):
            last = k + 1 == len(states)
            after = state if last else states[k + 1]
            self.memory.append((state, torch.tensor([action]), after, reward, last))
        self.memory = self.memory[-self.size :]
        if not train:
            return
        for _ in range(self.layers):
            self._update()

    def _update(self) -> None:
        picked = torch.randint(len(self.memory), (64,), generator=self.draw).tolist()
        states, actions, after, rewards, last = zip(*(self.memory[k] for k in picked), strict=True)
        s, a, n = torch.stack(states), torch.stack(actions), torch.stack(after)
        with torch.no_grad():
            follow = self.slow[1](torch.cat([n, self.slow[0](n)], 1))[:, 0]
            goal = torch.tensor(rewards) - self.average + torch.where(torch.tensor(last), 0.0, follow)
        for step, loss in (
            (self.steps[1], lambda: (self.critic(torch.cat([s, a], 1))[:, 0] - goal).square().mean()),
            (self.steps[0], lambda: -self.critic(torch.cat([s, self.actor(s)], 1)).mean()),
        ):
            step.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            step.step()
        for slow, fast in zip(self.slow, (self.actor, self.critic), strict=True):
            for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
                p.data.lerp_(q.data, 0.01)


def _network(inputs: int, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1), last)
