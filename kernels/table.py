"""What `kernels.bench` prints, and the table of kernels/README.md: forward + backward, trainable
head, from every file in kernels/results."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
START, END = "<!-- kernels.bench: table -->", "<!-- end of table -->"
HEADER = """
| op | dtype | V x D | N | supervised | implementation | ms | peak GB | of yardstick | times ours |
|---|---|---|---|---|---|---|---|---|---|""".splitlines()


def case_of(row):
    return tuple(row[key] for key in "op V D N valid frozen backward dtype".split())


def report(rows):
    """Print the rows of one case."""
    peers = [row["ms"] for row in rows if not row["implementation"].startswith("ours")]
    best = min(peers, default=rows[0]["ms"])
    for row in rows:
        line = f"  {row['dtype']:8} {row['implementation']:30} {row['ms']:10.2f} ms "
        line += f"{row['peak_gb']:7.3f} GB  {best / row['ms']:5.2f}x the best peer's speed  "
        line += f"of yardstick {row['of_yardstick']:4.0%}  "
        if "of_floor" in row:
            line += f"of floor {row['of_floor']:4.0%}  "
        if "errors" in row:
            line += "errors " + " ".join(f"{error:.1e}" for error in row["errors"])
        print(line, flush=True)


def write_table():
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    table = ""
    for result in results:
        rows = result["rows"]
        dates = sorted({row["date"] for row in rows})
        versions = (result["versions"] | result["peers"]).items()
        about = [result["device"], " to ".join(dict.fromkeys((dates[0], dates[-1])))]
        about += [f"{name} {version}" for name, version in versions]
        about += [f"threads: {result['threads']}"]
        table += "\n".join([f"{', '.join(about)}, {result['clock']}:", *HEADER, ""])
        for row in [row for row in rows if row["backward"] and not row["frozen"]]:
            cells = [row["op"], row["dtype"], f"{row['V']} x {row['D']}", f"{row['N']}"]
            cells += [f"{row['valid']:.0%}", row["implementation"], f"{row['ms']:.4g}"]
            cells += [f"{row['peak_gb']:.2f}", f"{row['of_yardstick']:.0%}"]
            cells += [f"{row['times_ours']:.2f}" if row["times_ours"] else ""]
            table += f"| {' | '.join(cells)} |\n"
        table += "\n"
    if not any(result["cuda"] for result in results):
        table += "CUDA: not measured yet.\n"
    before, rest = README.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    README.write_text(f"{before}{START}\n{table}{END}{after}", encoding="utf-8")
