"""Writes the README's table and docs/results.md from bench/results, so that they quote nothing else.

Run: make bench NAME=readme
"""

import json
import textwrap
from collections.abc import Iterator

from table import ROOT

PAPERS = {"lenet300": "27 kB, 40x", "lenet5": "44 kB, 39x"}  # what Deep Compression states
BEGIN, END = "## What it reaches", "## Read on"
WEIGHTS = {"lenet5": 431_080, "resnet20": 269_722, "mobilenetv2": 3_489_097, "minilm": 22_713_216}  # float32
WAYS = ("attach", "into", "torch.load")  # to a network that answers


def results(name: str) -> dict:
    return json.loads((ROOT / "bench/results" / f"{name}.json").read_text())


def paragraph(*parts: str) -> str:
    return "\n" + textwrap.fill(" ".join(parts), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def deep_compression() -> Iterator[str]:
    yield paragraph(
        "**Deep Compression** (`bench/deep_compression.py`; MNIST, the given Caffe networks, retrained with shifts of",
        "up to two pixels):",
    )
    yield "| network | coder | bytes | smaller | accuracy (float) | the paper's file |"
    yield "|---|---|---|---|---|---|"
    for r in results("deep_compression")["rows"]:
        if r["stage"].startswith("centroids"):
            coder = "Huffman" if "Huffman" in r["stage"] else "smallest codec"
            reached = f"{100 * r['accuracy']:.2f} % ({100 * r['reference']:.2f} %)"
            yield f"| {r['network']} | {coder} | {r['bytes']:,} | {r['ratio']}x | {reached} | {PAPERS[r['network']]} |"


def without_retraining() -> Iterator[str]:
    table = results("ptq")
    found, fast = table["bytes_to_nnc_at_equal_accuracy"], table["least_speed_over_nnc"]
    worst = max(found, key=found.get)
    yield paragraph(
        "**Without retraining** (`bench/ptq.py`): bytes against those of the reference coder of ISO/IEC 15938-17",
        "(nncodec 2.1.3, dependent quantization, nonweight_qp -40, the better of with and without BatchNorm folding)",
        f"at equal accuracy, interpolated. The geometric mean over {len(found)} networks is",
        f"{table['geometric_mean']}, the worst {worst} with {found[worst]}.",
        "For the ImageNet networks accuracy means top-1 agreement with the float network on 300 images.",
        "The last column is by the clock on two cores, of which the ISO codec uses one, where it is least.",
    )
    yield "| network | bytes : accuracy | bytes to the ISO codec's | decoding, times as fast |"
    yield "|---|---|---|---|"
    for name, ratio in found.items():
        rows = rows_of(table["rows"], name)
        points = sorted((r["bytes"], r["accuracy"]) for r in rows if r["method"] == "tersenet")
        curve = ", ".join(f"{size / 1000:.1f} kB : {100 * accuracy:.2f} %" for size, accuracy in points)
        yield f"| {name} (float {100 * rows[0]['reference']:.2f} %) | {curve} | {ratio} | {fast[name]} |"


def mixtures() -> Iterator[str]:
    table = results("mixed")
    yield paragraph(
        "**One budget for all methods, without retraining** (`bench/mixed.py`): each method at its own setting that",
        "meets the size, and candidates of all of them together (`papers.mixed`). Empty: no setting is so small. Of",
        "MobileNetV2 it is agreement with the float network on 300 images, one of which is 0.33 points.",
    )
    methods = list(dict.fromkeys(r["method"] for r in table["rows"]))
    yield "| network, bytes at most | " + " | ".join(methods) + " |"
    yield "|---|" + "---|" * len(methods)
    for network, asked in dict.fromkeys((r["network"], r["asked"]) for r in table["rows"]):
        own = {r["method"]: r["accuracy"] for r in table["rows"] if (r["network"], r["asked"]) == (network, asked)}
        cells = ["" if own.get(m) is None else f"{100 * own[m]:.2f} %" for m in methods]
        yield f"| {network}, {asked:,} | " + " | ".join(cells) + " |"


def sequences() -> Iterator[str]:
    rows = results("sequence")["rows"]
    kinds = {"minilm": ("accuracy", "{:.4f}", "Spearman"), "charlstm": ("nats", "{:.3f}", "nats a character")}
    yield paragraph(
        "**Sentence encoder and character LSTM, without retraining** (`bench/sequence.py`): all-MiniLM-L6-v2 (22.7",
        "million weights) on the pairs of the STS benchmark's test split, calibrated on 512 training sentences or on",
        "nothing; a two-layer LSTM on Shakespeare. Whole files; rounding and GPTQ are followed by zstd -19.",
    )
    yield "| network | method | bytes : measure |"
    yield "|---|---|---|"
    for name, (key, form, label) in kinds.items():
        own = [r for r in rows_of(rows, name) if "density" not in r]
        ours_first = sorted(dict.fromkeys(r["method"] for r in own), key=lambda m: not m.startswith("tersenet"))
        for method in ours_first:
            points = sorted((r["bytes"], r[key]) for r in own if r["method"] == method)
            curve = ", ".join(f"{size / 1000:,.0f} kB : {form.format(value)}" for size, value in points)
            yield f"| {name} ({label}, float {form.format(own[0]['reference'])}) | {method} | {curve} |"
    for r in rows:
        if "density" in r:
            yield paragraph(
                f"Retrained ({r['method']}, {r['settings']}): at a density of {r['density']} the {r['network']} has",
                f"{r['nats']:.3f} nats a character (given: {r['reference']:.3f}) in {r['bytes']:,} bytes.",
            )


def ablation() -> Iterator[str]:
    rows = results("ablation")["rows"]
    yield paragraph(
        "What each part earns (`bench/ablation.py`): thousandths of a nat of divergence from the float network on test",
        "inputs, at one size; parts are added from the top.",
    )
    names = list(dict.fromkeys(r["network"] for r in rows))
    yield "| part | " + " | ".join(f"{n}, {rows_of(rows, n)[0]['bytes'] / 1000:.0f} kB" for n in names) + " |"
    yield "|---|" + "---|" * len(names)
    for k, row in enumerate(rows_of(rows, names[0])):
        cells = [f"{rows_of(rows, n)[k]['divergence']:.0f}" for n in names]
        yield f"| {row['method'].split(' (')[0]} | " + " | ".join(cells) + " |"


def rows_of(rows: list[dict], network: str) -> list[dict]:
    return [r for r in rows if r["network"] == network]


def pruning() -> Iterator[str]:
    rows = results("pruning")["rows"]
    parts = {part: [r for r in rows if r["part"] == part] for part in dict.fromkeys(r["part"] for r in rows)}
    yield paragraph(
        "**Pruning with retraining** (`bench/pruning.py`): files of the given networks, retrained with shifts (MNIST)",
        "or crops and flips (CIFAR-10), one seed. ResNet-20 was pruned to a quarter, trained with its rate rewound and",
        "quantized with zeros held; its density is that of the levels. LeNet-5's rounds and bits were raised after a",
        "trial whose test accuracy was looked at.",
    )
    yield "| network | how | density | bytes | accuracy (float) |"
    yield "|---|---|---|---|---|"
    for part in ("lenet300-file", "lenet5-file", "resnet20-file"):
        for r in parts.get(part, []):
            density = r.get("density", r.get("density_of_levels"))
            shown = "" if density is None else f"{100 * density:.1f} %"
            reached = f"{100 * r['accuracy']:.2f} % ({100 * r['reference']:.2f} %)"
            size, paper = (f"{r['bytes']:,}", "") if "bytes" in r else ("", " (the paper's figure)")
            yield f"| {r['network']} | {r['method']}{paper} | {shown} | {size} | {reached} |"
    yield from curves(parts)
    yield from second_order(parts)


def curves(parts: dict[str, list[dict]]) -> Iterator[str]:
    yield paragraph(
        "Accuracy by density and form of retraining (LeNets trained from scratch, means over seeds; the given",
        "ResNet-20, one seed and few epochs). The last column is read off these test figures, not chosen before:",
    )
    yield "| network | method | seeds, epochs a round | density : accuracy | sparsest not below float |"
    yield "|---|---|---|---|---|"
    for part in ("lenet300-curves", "lenet5-curves", "resnet20-curves"):
        rows = parts.get(part, [])
        for method in dict.fromkeys(r["method"] for r in rows):
            own = [r for r in rows if r["method"] == method]
            every = max(1, len(own) // 6)
            shown = own[::-1][::every][::-1]
            points = ", ".join(f"{100 * r['density']:.1f} % : {100 * r['accuracy']:.2f} %" for r in shown)
            head = f"| {own[0]['network']} (float {100 * own[0]['reference']:.2f} %) | {method} "
            free = min((r["density"] for r in own if r["accuracy"] >= r["reference"]), default=None)
            seeds = len(own[0].get("accuracies", [0]))
            least = "none" if free is None else f"{100 * free:.1f} %"
            yield head + f"| {seeds}, {own[0]['epochs_a_round']} | {points} | {least} |"


def second_order(parts: dict[str, list[dict]]) -> Iterator[str]:
    yield paragraph("Second-order pruning and channels, from the given networks:")
    yield "| network | method | kept | accuracy without retraining | epochs | accuracy (float) |"
    yield "|---|---|---|---|---|---|"
    for part in (
        "resnet20-surgery",
        *(f"{n}-second-order" for n in ("lenet300", "lenet5", "resnet20")),
        "resnet20-search",
    ):
        for r in parts.get(part, []):
            kept = (
                f"{r['macs'] / 1e6:.1f} M MACs"
                if "macs" in r
                else f"{100 * r.get('density', 1 - r.get('zeros', 0)):.0f} %"
            )
            before = r.get("before", None if r["epochs"] else r["accuracy"])
            untrained = "" if before is None else f"{100 * before:.2f} %"
            after = f"{100 * r['accuracy']:.2f} % ({100 * r['reference']:.2f} %)" if r["epochs"] else ""
            yield f"| {r['network']} | {r['method']} | {kept} | {untrained} | {r['epochs'] or ''} | {after} |"
    rows = parts.get("channels", [])
    if rows:
        said = "; ".join(
            f"{r['network']} {r['parameters'] / r['parameters_before']:.0%} of the parameters, "
            f"{r['latency_ratio']:.2f} of the latency, {100 * r['accuracy']:.1f} % "
            f"({100 * r['reference']:.1f} %)"
            for r in rows
        )
        yield paragraph(
            "Half the MACs taken out as whole channels at one ratio, layers fitted again but not retrained; the",
            f"smaller module runs and exports (one image, one thread, CPU time): {said}.",
            "For the ImageNet networks the last figure is top-1 agreement with the float network.",
        )


def codecs() -> Iterator[str]:
    rows = {(r["network"], r["method"], r.get("qp")): r for r in results("codecs")["rows"]}
    sparse, laplace = rows["stream S", "rans", None], rows["stream L", "rans", None]
    context, load = rows["stream S", "context", None], rows["lenet5", "import and load without torch", None]
    fine, coarse = (rows["resnet20 levels", "context", qp] for qp in (-20, -16))
    fewer = 1 - fine["bytes"] / rows["resnet20 levels", "NNC", -20]["bytes"]
    over = max(sparse["over_entropy_percent"], laplace["over_entropy_percent"])
    ans, queue = "decode_over_constriction_ans", "decode_over_constriction_range"
    yield paragraph(
        f"**Codecs** (`bench/codecs.py`, one thread): rANS decodes {sparse[ans]}x (80 % zeros, 4 bit) and",
        f"{laplace[ans]}x (8-bit Laplace) as fast as constriction's ANS, at most {over} % over the entropy.",
        f"The context coder needs {100 * fewer:.1f} % fewer bytes than the ISO codec for the same levels of ResNet-20",
        f"and decodes them {fine['decode_over_nnc']}x and, coarser, {coarse['decode_over_nnc']}x as fast;",
        f"on the first stream it decodes at {context[queue]}x the speed of constriction's range coder.",
        f"Importing and loading LeNet-5 without torch takes {load['cpu_seconds']} s of CPU;",
        f"beyond NumPy the installation weighs {load['installed_mb_beyond_numpy']} MB.",
    )


def codes() -> Iterator[str]:
    rows = results("codes")["rows"]
    yield paragraph(
        "**Shared values, vector codes and filters** (`bench/codes.py`): the authors' own files, taken in as the trees",
        "they are with every weight the same, and the same dithered integers in several codes.",
    )
    yield "| published file | its bytes | ours | smaller |"
    yield "|---|---|---|---|"
    for r in (r for r in rows if r["part"] == "published"):
        yield f"| {r['network']} | {r['published']:,} | {r['bytes']:,} | {1 - r['bytes'] / r['published']:.1%} |"
    for dithered, lattice in ((True, "a dithered lattice"), (False, "a plain one")):
        own = {r["method"]: r["bytes"] for r in rows if r["part"] == "coders" and r["dithered"] == dithered}
        if own:
            said = ", ".join(f"{name} {size:,}" for name, size in own.items())
            yield paragraph(f"LeNet-5 pruned to a tenth, on {lattice}, in bytes: {said}.")
    if filters := [r for r in rows if r["part"] == "filter"]:
        yield "\n| keys of a Bloomier filter | layout | cells a key | built, CPU s | million keys a second, one core |"
        yield "|---|---|---|---|---|"
        for r in filters:
            rate = f"{r['build_seconds']} | {r['million_keys_per_second']}"
            yield f"| {r['keys']:,} | {r['method']} | {r['cells_per_key']} | {rate} |"
    seconds = {r["method"]: r["seconds"] for r in rows if r["part"] == "clusters"}
    if seconds:
        ours, peer = seconds["tersenet"], seconds["scikit-learn"]
        yield paragraph(
            "Ten steps of k-means of 2 million vectors of 4 values, 256 clusters:",
            f"{ours} s, scikit-learn's {peer} s.",
        )
    yield from methods([r for r in rows if r["part"] == "table"])


def methods(rows: list[dict]) -> Iterator[str]:
    if rows:
        yield paragraph("Every method at its settings, without training and after few epochs on a part of the data:")
        yield "| network | method | without training, bytes : accuracy | trained |"
        yield "|---|---|---|---|"
    for network, method in dict.fromkeys((r["network"], r["method"]) for r in rows):
        own = [r for r in rows if (r["network"], r["method"]) == (network, method)]
        cells = []
        for trained in (False, True):
            points = sorted((r["bytes"], r["accuracy"]) for r in own if bool(r["epochs"]) == trained)
            cells.append(", ".join(f"{size:,} : {100 * accuracy:.2f} %" for size, accuracy in points))
        yield f"| {network} (float {100 * own[0]['reference']:.2f} %) | {method} | {cells[0]} | {cells[1]} |"


def traffic() -> Iterator[str]:
    table = results("traffic")
    rows = [r for r in table["rows"] if "workers" in r]
    rates = list(dict.fromkeys(r["rate"] for r in rows))
    slowest = [r for r in rows if r["rate"] == rates[-1] and r["workers"] == 4 and r["method"] == "3LC, s = 1.75"]
    slow = {r["network"]: r["times_faster"] for r in slowest}
    yield paragraph(
        "**Traffic of data-parallel training** (`bench/traffic.py`): from random weights, each worker in a network",
        f"namespace of one machine with two cores, {table['note']}. Bytes and accuracy are those of all steps at",
        f"{rates[0]}. 3LC's paper has 39 to 107 times fewer bytes, 16 to 23 times less time at 10 Mbit/s and accuracy",
        f"within 0.5 points; with four workers and s = 1.75 LeNet-5 is {slow['lenet5']} times as fast there,",
        f"ResNet-20, whose steps compute for longer than they send, {slow['resnet20']}.",
    )
    times = " | ".join(f"times faster, {rate}" for rate in rates)
    yield f"| network | workers | method | times fewer bytes | {times} | accuracy |"
    yield "|---|---|---|---|" + "---|" * len(rates) + "---|"
    for name, workers, method in dict.fromkeys((r["network"], r["workers"], r["method"]) for r in rows):
        own = {r["rate"]: r for r in rows if (r["network"], r["workers"], r["method"]) == (name, workers, method)}
        whole = own[rates[0]]
        faster = " | ".join(str(own[rate].get("times_faster", "")) for rate in rates)
        accuracy = f"{100 * whole['accuracy']:.2f} % ({whole['steps']} steps)"
        yield f"| {name} | {workers} | {method} | {whole['times_fewer']} | {faster} | {accuracy} |"


def updates() -> Iterator[str]:
    rows = results("updates")["rows"]
    yield paragraph(
        "**Updates** (`bench/updates.py`): ResNet-20 before and after an epoch more, as `terse diff` and general",
        "packers of the difference send it.",
    )
    yield "| update | bytes | times smaller than the float weights | accuracy (new network) |"
    yield "|---|---|---|---|"
    for r in (r for r in rows if r["bytes"]):
        accuracy = f"{100 * r['accuracy']:.2f} % ({100 * r['reference']:.2f} %)" if "accuracy" in r else ""
        yield f"| {r['method']} | {r['bytes']:,} | {r['times_smaller']} | {accuracy} |"


def device() -> Iterator[str]:
    rows = results("device")["rows"]
    code = ", ".join(f"{r['text']:,} for {r['machine']}" for r in rows if "text" in r)
    networks = [r for r in rows if "network" in r]
    right = min(r["same_answers_of_1000"] for r in networks)
    apart = max(r["largest_difference"] for r in networks)
    yield paragraph(
        "**Small devices** (`bench/device.py`; `examples/c`, no `malloc`): program, decoder and products are bytes of",
        f"code: {code} (`-Os`, without the C library). Of 1,000 test digits at least {right:,} have the dense model's",
        f"answer; outputs differ by up to {apart:.6f}. The networks were pruned in one short round, so accuracy is not",
        "the subject here.",
    )
    yield "| network and file | bytes | memory at most | once loaded | dense | ms to load | ms a digit |"
    yield "|---|---|---|---|---|---|---|"
    for r in networks:
        held = f"{r['peak_memory']:,} | {r['memory_loaded']:,} | {r['dense_bytes']:,}"
        times = f"{r['ms_to_load']:.1f} | {r['ms_a_digit']:.2f}"
        yield f"| {r['network']}, {r['method']} | {r['bytes']:,} | {held} | {times} |"


def runtime() -> Iterator[str]:
    rows = [r for r in results("runtime")["rows"] if r.get("layer") == "4096 x 4096" and r["threads"] == 1]
    yield paragraph(
        "**Products with packed weights** (`bench/runtime.py`): 4096 x 4096, one thread, from memory, the least",
        "of rounds in which all take turns, and times as fast as torch's float32. Sparse rows aim at 5.5 (90 %), 10",
        "(95 %) and miss it here, and so does a batch of 32 at torch's 8 bits.",
    )
    yield "| form | batch 1, ms | times as fast | batch 32, ms | times as fast |"
    yield "|---|---|---|---|---|"
    for form in dict.fromkeys(r["form"] for r in rows):
        cells = [f"{r['least_ms']:.2f} | {r['times_torch']:.2f}" for r in rows if r["form"] == form]
        yield f"| {form} | {' | '.join(cells)} |"


def attached() -> Iterator[str]:
    rows = results("runtime")["rows"]
    yield paragraph(
        "**Networks that run from their file** (`bench/runtime.py`, part networks): `attach` against the dense network",
        "of `into` and against `torch.load` of its float file, in a process that has the module already. Times of one",
        "thread, medians; memory is by how much the process grows until the first answer.",
    )
    yield (
        "| network | bytes | times as fast as dense, batch 1 | batch 32 | loaded, ms: attach, into, torch.load"
        " | MB: attach, into, torch.load |"
    )
    yield "|---|---|---|---|---|---|"
    for name in dict.fromkeys(r["network"] for r in rows if "network" in r):
        own = [r for r in rows if r.get("network") == name]
        ours = {r["batch"]: r for r in own if r.get("form") == "ours"}
        ways = {r["way"]: r for r in own if "way" in r}
        loaded = ", ".join(f"{ways[way]['load_ms']:.0f}" for way in WAYS)
        held = ", ".join(f"{ways[way]['memory'] / 1e6:.0f}" for way in WAYS)
        fast = " | ".join(f"{ours[batch]['times_torch_median']:.2f}" for batch in (1, 32))
        yield f"| {name} | {ours[1]['bytes']:,} | {fast} | {loaded} | {held} |"


def six_rows() -> Iterator[str]:
    """What the README shows: the files that stand for the rest."""
    yield "| network | how | bytes | smaller than float32 | on the test split (float32) |"
    yield "|---|---|---|---|---|"
    pruned = results("pruning")["rows"]
    shown = [next(r for r in pruned if r["part"] == "lenet5-file" and "shared" in r["method"])]
    shown.append(next(r for r in pruned if r["method"] == "learning-rate rewinding, then output-aware quantization"))
    untrained = [r for r in results("ptq")["rows"] if r["method"] == "tersenet"]
    shown += [smallest(untrained, "resnet20", 0.005), smallest(untrained, "mobilenetv2", 0.02)]
    encoder = [r for r in results("sequence")["rows"] if r["network"] == "minilm"]
    shown += [smallest([r for r in encoder if r["method"] == m], "minilm", 0.005) for m in ("tersenet", BLIND)]
    for r in shown:
        measure = "Spearman {:.4f} ({:.4f})" if r["network"] == "minilm" else "{:.2%} ({:.2%})"
        ratio = 4 * WEIGHTS[r["network"]] / r["bytes"]
        how = {"tersenet": "no retraining", BLIND: "weights alone, no data"}.get(r["method"], r["method"])
        reached = measure.format(r["accuracy"], r["reference"])
        yield f"| {r['network']} | {how} | {r['bytes']:,} | {ratio:.0f}x | {reached} |"


BLIND = "tersenet, without data"


def smallest(rows: list[dict], network: str, drop: float) -> dict:
    """The smallest file of a network whose measure falls by at most so much."""
    kept = [r for r in rows_of(rows, network) if r["accuracy"] >= r["reference"] - drop]
    return min(kept, key=lambda r: r["bytes"])


def joined(parts: list[str]) -> str:
    return "\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text()
    said = paragraph(
        "Whole files, measured after opening them again; for mobilenetv2 agreement with the float network. Without",
        f"retraining our files are {results('ptq')['geometric_mean']} times the size of the ISO/IEC 15938-17",
        "reference coder's at equal accuracy (geometric mean over six networks). `docs/results.md` has the tables.",
    )
    section = joined([BEGIN, "", *six_rows(), said])
    path.write_text(text[: text.index(BEGIN)] + section.rstrip() + "\n\n" + text[text.index(END) :])
    held = "Whole-file bytes, accuracy of the reopened file on the test split; `bench/results` holds every row, with"
    head = ["# Results", paragraph(held, "settings and peers, and the commit that made it.")]
    tables = [*deep_compression(), *without_retraining(), *mixtures(), *sequences(), *ablation(), *pruning(), *codecs()]
    tables += [*codes(), *traffic(), *updates(), *runtime(), *attached(), *device()]
    (ROOT / "docs/results.md").write_text(joined([*head, *tables]))
