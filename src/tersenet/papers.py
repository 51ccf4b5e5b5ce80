"""Published methods as short compositions of stages; the equations stand in the methods' own files."""

from tersenet.methods.kmeans import KMeans
from tersenet.recipe import Recipe
from tersenet.stages.finetune import Finetune
from tersenet.stages.pack import Narrow, Pack
from tersenet.stages.prune import Prune


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


PAPERS = {"deep-compression": deep_compression}
