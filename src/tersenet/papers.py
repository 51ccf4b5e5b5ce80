"""Published methods as short compositions of stages; the equations stand in the methods' own files."""

import math
from collections.abc import Callable

from tersenet.allocators.amc import AMC
from tersenet.budget import Budget
from tersenet.methods import Method, chain
from tersenet.methods.compact import CReLU, Fire, Grouped, Rotations, Separable
from tersenet.methods.factorize import Tucker2
from tersenet.methods.fixed_point import FixedPoint
from tersenet.methods.kmeans import KMeans
from tersenet.methods.product import Product
from tersenet.methods.sparse import Magnitude
from tersenet.methods.tensor_train import TensorTrain
from tersenet.methods.transform import KernelDCT
from tersenet.methods.uniform import Uniform
from tersenet.run import Recipe, Stage
from tersenet.stages.activations import Activations
from tersenet.stages.channels import SearchChannels
from tersenet.stages.dkm import DKM
from tersenet.stages.finetune import Distill, Finetune
from tersenet.stages.hashed import Hash
from tersenet.stages.layerwise import Layerwise
from tersenet.stages.levels import INQ, MLQ, SLQ
from tersenet.stages.low_precision import LowPrecision
from tersenet.stages.lowrank import ENC
from tersenet.stages.lsq import LSQ
from tersenet.stages.obs import OBS
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune, Retrain
from tersenet.stages.recalibrate import Recalibrate
from tersenet.stages.universal import Universal
from tersenet.stages.waterfill import Waterfill
from tersenet.stages.weightless import Weightless
from tersenet.where import Where


def output_aware(budget: Budget | None = None, samples: int = 1024) -> Recipe:
    """Output-aware quantization in the Fisher metric without retraining, to a budget: what `compress` does by itself.

    Steps by waterfilling (Lifar et al. 2026), levels with error feedback along a trellis, context-modelled coding.
    """
    return (Waterfill(budget=budget, samples=samples),)


def mixed(budget: Budget | None = None, samples: int = 1024) -> Recipe:
    """Each weight by the method that serves it best at a size, without retraining: one exchange of bits for errors.

    Offered are steps by waterfilling, k-means of 2 to 5 bits, rounding by row to 3 to 8 bits, magnitude pruning with
    k-means on what stays, and what holds a weight without loss; Lagrange's multiplier chooses (Everett 1963).
    """
    pruned = [chain(Magnitude(density), KMeans(bits)) for density in (0.5, 0.25, 0.1) for bits in (3, 4)]
    shared, rounded = map(KMeans, range(2, 6)), (Uniform(bits, by_row=True) for bits in (3, 4, 5, 6, 8))
    methods: tuple[Method, ...] = (*shared, *rounded, *pruned)
    return (Waterfill(budget=budget, samples=samples, methods=methods),)


def deep_compression(density: float = 0.1, bits: int = 5, rounds: int = 5, epochs: int = 1, seed: int = 0) -> Recipe:
    """Deep Compression (Han, Mao, Dally 2016): prune with retraining, cluster, tune the centroids, code.

    `density` of the weights survives, reached in `rounds` of `epochs` of retraining each; survivors of each layer share
    2^`bits` values. Where the paper sets a threshold for each layer by hand, one global magnitude threshold decides.
    """
    return (
        Prune(density, rounds, epochs, final=2 * epochs, seed=seed),
        Pack(KMeans(bits)),
        Finetune(max(1, epochs // 2), seed=seed),
        Narrow(),
    )


def lr_rewinding(density: float = 0.1, rounds: int | None = None, epochs: int = 10, seed: int = 0) -> Recipe:
    """Learning-rate rewinding (Renda, Frankle, Carbin 2020): prune the smallest 20 % globally, replay the schedule.

    Every round replays the last `epochs` of the task's own schedule from the weights as they are. Without `rounds`
    there are as many as 20 % a round takes.
    """
    return Prune(density, rounds or _rounds(density), epochs, seed=seed), Narrow()


def lottery_ticket(density: float = 0.1, rounds: int | None = None, epochs: int = 10, seed: int = 0) -> Recipe:
    """Lottery ticket (Frankle, Carbin 2019; Frankle et al. 2020): prune, and go back to the survivors' early weights.

    Every round goes back to the weights before the last `epochs` of the task's schedule, which the task must have kept
    (`Task.trained(keep=[epoch])`), and trains from there.
    """
    return Prune(density, rounds or _rounds(density), epochs, retrain="weights", seed=seed), Narrow()


def mlprune(density: float = 0.1, rounds: int = 3, epochs: int = 1, damping: float = 0.01, seed: int = 0) -> Recipe:
    """MLPrune (Zeng, Urtasun 2019): Kronecker-factored second-order pruning, one threshold for all layers.

    Each of `rounds` measures the moments again, removes weights, moves the survivors by the sum of the single updates
    and retrains for `epochs` of the task's schedule.
    """
    stages: list[Stage] = []
    for number in range(1, rounds + 1):
        stages += [
            OBS(density ** (number / rounds), "kronecker", "sum", damping, seed=seed + number),
            Retrain("learning-rate", epochs, seed + number),
        ]
    return (*stages, Narrow())


def exact_obs(density: float = 0.5, samples: int = 1024, seed: int = 0) -> Recipe:
    """ExactOBS (Frantar, Alistarh 2022): exact second-order pruning without retraining, merged over rows and layers."""
    return OBS(density, "exact", samples=samples, seed=seed), Narrow()


def sparsegpt(density: float = 0.5, samples: int = 1024, seed: int = 0) -> Recipe:
    """SparseGPT (Frantar, Alistarh 2023): one sweep over the columns of each layer, without retraining."""
    return OBS(density, "sweep", samples=samples, seed=seed), Narrow()


def amc(macs: float = 0.5, episodes: int = 100, epochs: int = 0, seed: int = 0) -> Recipe:
    """AMC (He et al. 2018): a learned agent sets how many channels of each layer stay, within a part of the MACs.

    A short fine-tuning of `epochs` follows the search.
    """
    search = SearchChannels(macs, AMC(episodes, min(25, episodes // 4), seed=seed))
    return search, Retrain("learning-rate", epochs, seed), Narrow()


def bit_goes_down(
    bits: int = 8, kernels: int = 1, feedback: bool = False, epochs: int = 1, final: int = 3, seed: int = 0
) -> Recipe:
    """And the Bit Goes Down (Stock et al. 2020): product quantization in the metric of each layer's inputs.

    Layer by layer, each distilled by itself for `epochs`, then all codewords together for `final`. `kernels` 1 makes
    the paper's small blocks, 2 its large ones. Layers of fewer than 1,000 weights stay dense. With `feedback` vectors
    make up for the errors of those before them, which the paper has not.
    """
    method = Product(bits, kernels, feedback=feedback, seed=seed)
    return (
        Layerwise(None, (("least:1000", method),), seed=seed, distill=Distill(epochs, seed=seed) if epochs else None),
        Distill(final, seed=seed),
        Narrow(),
    )


def slq(bits: int = 5, rounds: int = 5, epochs: int = 1, seed: int = 0) -> Recipe:
    """Single-level quantization (Xu et al. 2018): 2^(bits - 1) + 1 values a layer, those that lose most first."""
    return SLQ(bits, rounds, epochs, seed), Narrow()


def mlq(rounds: int = 2, groups: int = 4, epochs: int = 1, seed: int = 0) -> Recipe:
    """Multi-level quantization (Xu et al. 2018): three values a layer, by parts of clusters and groups of layers."""
    return MLQ(rounds, groups, epochs, seed), Narrow()


def universal(
    density: float = 0.1,
    bits: int = 5,
    dimension: int = 1,
    dithered: bool = True,
    rounds: int = 5,
    epochs: int = 1,
    seed: int = 0,
) -> Recipe:
    """Universal compression (Choi, El-Khamy, Lee 2018): prune, round to one dithered lattice, tune its values.

    `density` of the weights survives; `bits` set the step, and `dimension` neighbours share a dither and are one
    symbol.
    """
    return (
        Prune(density, rounds, epochs, final=2 * epochs, seed=seed),
        Universal(bits, dimension, dithered, seed),
        Finetune(epochs, seed=seed, gradient="mean"),
        Narrow(),
    )


def hashed_nets(density: float = 0.125, epochs: int | None = None, seed: int = 0) -> Recipe:
    """HashedNets (Chen et al. 2015): `density` buckets a weight, shared by hashing and trained from the beginning."""
    return Hash(density, epochs=epochs, seed=seed), Narrow()


def transform_coding(bits: int = 6, clusters: int = 4, block: int = 8) -> Recipe:
    """Transform coding with clustering (Laude, Richter, Ostermann 2018): the DCT of kernels and of blocks of matrices.

    Coefficients are rounded to `bits`, biases and norms share 2^`clusters` values each. With a drop as the budget the
    bits are searched, as in the paper.
    """
    return Pack(chain(KernelDCT(block), Uniform(bits)), vectors=KMeans(clusters)), Narrow()


def inq(bits: int = 5, epochs: int = 1, seed: int = 0) -> Recipe:
    """Incremental network quantization (Zhou et al. 2017): powers of two, the largest weights first."""
    return INQ(bits, epochs=epochs, seed=seed), Narrow()


def lsq(bits: int = 4, epochs: int = 5, seed: int = 0) -> Recipe:
    """Learned step size quantization (Esser et al. 2020): weights trained at few bits, their steps with them."""
    return LSQ(bits, epochs=epochs, seed=seed), Narrow()


def dkm(bits: int = 4, vectors: bool = False, temperature: float = 0.1, epochs: int = 5, seed: int = 0) -> Recipe:
    """Differentiable k-means (Cho et al. 2022): weights trained through soft shares of 2^`bits` values for each layer.

    With `vectors` codewords are vectors of a kernel, or of 4 weights, each.
    """
    method = Product(bits, weighted=False, seed=seed) if vectors else KMeans(bits, seed=seed)
    return DKM(method, temperature=temperature, epochs=epochs, seed=seed), Narrow()


def fixed_point(bits: int = 8, dense: int = 5, width: int = 8) -> Recipe:
    """Dynamic fixed point (Gysel et al. 2018): weights, and what layers take and give, at steps of powers of two.

    Weights of linear layers have `dense` bits, all others `bits`, activations `width`.
    """
    return Pack(FixedPoint(bits), ((Where(kind="linear", idle=True), FixedPoint(dense)),)), Activations(width), Narrow()


def low_precision(bits: int = 8, epochs: int | None = None, seed: int = 0) -> Recipe:
    """Training in few bits throughout, with stochastic rounding (Gupta et al. 2015): from a fresh initialisation."""
    return (LowPrecision(bits, epochs, seed=seed),)


def weightless(
    density: float = 0.05, bits: int = 3, cells: int = 8, rounds: int = 5, epochs: int = 1, seed: int = 0
) -> Recipe:
    """Weightless (Reagen et al. 2018): pruned and clustered layers in Bloomier filters, retrained around what they err.

    `density` of the weights survives and shares 2^`bits` values for each layer; filters have `cells` bits a cell.
    """
    return (
        Prune(density, rounds, epochs, final=2 * epochs, seed=seed),
        Weightless(bits, cells, tune=epochs, seed=seed),
        Narrow(),
    )


def enc(
    macs: float = 0.5, by: str = "map", spatial: bool = True, weighted: bool = True, epochs: int = 1, seed: int = 0
) -> Recipe:
    """ENC (Kim, Khan, Kyung 2019): layers in two by SVD, ranks chosen without training, then a short tuning.

    `macs` of the multiplications are left; ranks by "map", "model" or "inf". Kernels are factored by space or,
    as the paper does in residual networks, by channels. `weighted` SVDs lose least in the metric of the layers' data,
    which the paper has not.
    """
    ranks = ENC(macs, by=by, spatial=spatial, weighted=weighted, seed=seed)
    return ranks, Recalibrate(), Finetune(epochs, seed=seed), Narrow()


def tucker_vbmf(scale: float = 1.0, epochs: int = 1, seed: int = 0) -> Recipe:
    """Tucker-2 with ranks by variational Bayes (Kim, Park, Yoo, Choi, Yang, Shin 2016), then a short tuning.

    The ranks that EVBMF finds are multiplied by `scale`.
    """
    return Pack(Tucker2(scale=scale)), Recalibrate(), Finetune(epochs, seed=seed), Narrow()


def tensor_train(part: float = 0.5, cores: int = 3, epochs: int = 1, seed: int = 0) -> Recipe:
    """Tensor trains of matrices and kernels (Novikov et al. 2015; Garipov et al. 2016), then a short tuning.

    The cap on the ranks is a `part` of the largest that saves anything. The papers train from the beginning; here the
    cores begin as those of the given weights.
    """
    return Pack(TensorTrain(part=part, cores=cores)), Recalibrate(), Finetune(epochs, seed=seed), Narrow()


COMPACT: dict[str, Method] = {
    "separable": Separable(), "fire": Fire(), "grouped": Grouped(), "crelu": CReLU(), "rotations": Rotations(),
}  # fmt: skip


def compact_filters(kind: str = "separable", epochs: int = 5, lr: float = 0.01, seed: int = 0) -> Recipe:
    """Kernels of a compact form, begun as the nearest to the given ones, then distilled from the given network.

    "separable" (Howard et al. 2017), "fire" (Iandola et al. 2016), "grouped" (Zhang et al. 2018), "crelu" (Shang et al.
    2016) or "rotations" (Cohen and Welling 2016). The papers train from the beginning, with activations between.
    """
    if kind not in COMPACT:
        raise ValueError(f"compact filters are one of {', '.join(COMPACT)}, not {kind!r}")
    return Pack(COMPACT[kind]), Recalibrate(), Distill(epochs, lr, temperature=3.0, seed=seed), Narrow()


def _rounds(density: float) -> int:
    if not 0 < density <= 1:
        raise ValueError(f"a density is in (0, 1], not {density}")
    return max(1, round(math.log(density) / math.log(0.8)))


PAPERS: dict[str, Callable[..., Recipe]] = {
    "output-aware": output_aware,
    "mixed": mixed,
    "deep-compression": deep_compression,
    "lr-rewinding": lr_rewinding,
    "lottery-ticket": lottery_ticket,
    "mlprune": mlprune,
    "exact-obs": exact_obs,
    "sparsegpt": sparsegpt,
    "amc": amc,
    "bit-goes-down": bit_goes_down,
    "slq": slq,
    "mlq": mlq,
    "universal": universal,
    "hashed-nets": hashed_nets,
    "transform-coding": transform_coding,
    "inq": inq,
    "lsq": lsq,
    "dkm": dkm,
    "fixed-point": fixed_point,
    "low-precision": low_precision,
    "weightless": weightless,
    "enc": enc,
    "tucker-vbmf": tucker_vbmf,
    "tensor-train": tensor_train,
    "compact-filters": compact_filters,
}
