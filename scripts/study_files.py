"""What a study leaves in its directory, for the scripts beside this file."""

import json


def lines(path):
    """Objects of a file of JSON lines. The last line of a study that still runs may be cut off: it is left out."""
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, 1):
        try:
            yield json.loads(text)
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise SystemExit(f"{path}:{number}: not JSON: {error.msg}") from None


def trials(directory):
    """Finished trials by index; of one trial's lines the last."""
    results = directory / "results.jsonl"
    if not results.is_file():
        raise SystemExit(f"{results}: not there: is {directory} the directory of a study?")
    return sorted({line["trial"]: line for line in lines(results)}.values(), key=lambda t: t["index"])


def metrics(directory, trial):
    """Evaluations and probes of a trial; none where it left no such file."""
    for folder in (directory / "trials").glob(f"{trial['index']:04}-*"):
        yield from lines(folder / "metrics.jsonl")
