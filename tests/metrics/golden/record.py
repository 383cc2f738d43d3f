"""Records what lexicalrichness 0.5.1 and vendi_score 0.0.3 say: python record.py POOL.jsonl

Both are installed for the recording only: one brings matplotlib and textblob, the other imports a name that SciPy is
about to remove. The pool is fastsel/data/pool_small.jsonl; six of its answers are kept, from short to long.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def lexical(pool: Path) -> list[dict]:
    from lexicalrichness import LexicalRichness

    answers = []
    for line in pool.read_text().splitlines():
        row = json.loads(line)
        answers.append(row.get("output") or " ".join(message.get("content", "") for message in row.get("messages", [])))
    answers = sorted((answer for answer in answers if len(answer) > 100), key=len)
    chosen = [answers[len(answers) * i // 8] for i in range(1, 7)]
    found = []
    for text in ["The cat saw the cat -- twice (2x), well-known!", *chosen]:
        rich = LexicalRichness(text)
        vocd = float(rich.vocd(seed=42)) if rich.words > 50 else None
        found.append({"text": text, "words": rich.wordlist, "ttr": float(rich.ttr), "vocd": vocd})
    return found


def vendi_scores() -> dict:
    from vendi_score import vendi

    x = np.random.default_rng(7).standard_normal((30, 4)) + 0.5
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    scores = {
        str(q): {"score_K": float(vendi.score_K(unit @ unit.T, q=q)), "score_dual": float(vendi.score_dual(x, q=q))}
        for q in (0.5, 1.0, 2.0)
    }
    return {"x": x.tolist(), "scores": scores}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    (HERE / "lexicalrichness.json").write_text(json.dumps(lexical(Path(sys.argv[1])), indent=1) + "\n")
    (HERE / "vendi_score.json").write_text(json.dumps(vendi_scores(), indent=1) + "\n")
