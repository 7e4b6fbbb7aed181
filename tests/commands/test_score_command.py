"""`mmr1-ds score`: its numbers against the definitions and sacrebleu, its errors, its files."""

import gzip
import io
import json
import math
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import sacrebleu
from fixtures.data_fixtures import build_tokenizer
from fixtures.launching import ROOT, environment

from mmr1_ds.commands import cli
from mmr1_ds.commands.score import command as score
from mmr1_ds.commands.score.tokens import open_tokenizer
from mmr1_ds.errors import UserError

SACREBLEU_NAMES = ("13a", "intl", "zh", "char")
FULL_WIDTH = "".join(chr(ord(character) + 0xFEE0) for character in "full,width123")
ODD_TEXTS = [
    ["The answer is 3.14, not 3,141!", "The answer is 3.14, not 3,141!", "The answer is 3.1", "The the the The"],
    ["今天天气很好。It is 20°C", "今天天气不好,it is 20 °C.", "天气 天气 天气", ""],
    ["", "", "a"],
    ["x-\ny &amp; z\n\n", "x- y & z &lt;skipped&gt;", " x\ty - z \u00a0 ", "<skipped>x$y=z+1"],
    [FULL_WIDTH, "naïve café — “quoted” … ½ €5", "Ελληνικά; русский? 한국어 日本語、テスト", "🙂🙂👍🏽 ok"],
    ["a b c d e f", "b c d e f g", "c d e", "c", "a b c d e f a b c d e f"],
]


def write_lines(path, *records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return str(path)


def group(responses, accuracies=None, **keys):
    return {"responses": responses, "accuracies": [0] * len(responses) if accuracies is None else accuracies, **keys}


GOOD = json.dumps(group([[1, 2], [3]])) + "\n"


def run(capsys, *arguments):
    """Returns: exit code, what stdout and stderr said."""
    code = cli.main(["score", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def scores_of(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--output", "-")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def mistake(capsys, *arguments):
    """The one line about a mistake."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("mmr1-ds: error: ") and err.count("\n") == 1, err
    return err.removeprefix("mmr1-ds: error: ").rstrip()


# --- against sacrebleu -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SACREBLEU_NAMES)
def test_self_bleu_of_texts_follows_from_sacrebleus_counts(capsys, tmp_path, name):
    """With method1 smoothing: 0.1 for a numerator of 0, a denominator of 1 at least."""
    file = write_lines(tmp_path / "groups.jsonl", *map(group, ODD_TEXTS))
    scores = scores_of(capsys, file, "--tokenizer", f"sacrebleu:{name}")
    for texts, found in zip(ODD_TEXTS, scores, strict=True):
        bleus = []
        for index, text in enumerate(texts):
            others = texts[:index] + texts[index + 1 :]
            bleu = sacrebleu.sentence_bleu(text, others, smooth_method="none", tokenize=name)
            logs = [math.log((c or 0.1) / max(t, 1)) for c, t in zip(bleu.counts[:3], bleu.totals[:3], strict=True)]
            bleus.append(bleu.bp * math.exp(sum(logs) / 3) if bleu.counts[0] else 0.0)
        assert found["self_bleu"] == pytest.approx(sum(bleus) / len(bleus), abs=1e-12)


# --- numbers by definition ---------------------------------------------------------------------------------------


def test_scores_by_hand(capsys, tmp_path):
    file = write_lines(
        tmp_path / "groups.jsonl",
        group([[7, 8, 9, 7]] * 4, [1, 1, 0, None], prompt_id="same", rewards=[1, 2, 3, 4]),
        "\n",
        group([[1, 2, 3], [4, 5, 6, 7]], [True, 0.5], prompt_id=5),
        group([[1, 2, 3, 4], [1, 2, 9, 9]], [None, None]),
        group([[3, 1, 2]], [1.0]),
    )
    same, different, half, single = scores_of(capsys, file)
    assert same == {
        "prompt_id": "same", "num_responses": 4, "num_tokens": 16, "vps": pytest.approx(0.8 * 2 / 9),
        "ovs": pytest.approx(2 / 9), "tds": 0.0, "pass_rate": pytest.approx(2 / 3), "reward_mean": 2.5,
        "reward_variance": 1.25, "self_bleu": 1.0, "self_bleu_by_order": [1.0] * 3,
        "distinct": [3 / 16, 3 / 12, 2 / 8], "edit_distance": None,
    }  # fmt: skip
    assert (different["prompt_id"], different["tds"], different["ovs"]) == (5, 1.0, 0.1875)
    assert different["vps"] == pytest.approx(0.8 * 0.1875 + 0.2)
    assert different["reward_variance"] == 0.0625
    # Of each response two of four 1-grams, one of three 2-grams and no 3-gram stand in the other.
    bleu = (2 / 4 * 1 / 3 * 0.1 / 2) ** (1 / 3)
    assert half["self_bleu"] == pytest.approx(bleu) and half["tds"] == pytest.approx(1 - bleu)
    assert half["distinct"] == pytest.approx([5 / 8, 5 / 6, 4 / 4])
    assert half["prompt_id"] == 4  # the number of the line
    unknown = ("vps", "ovs", "pass_rate", "reward_mean", "reward_variance")
    assert {key for key in half if half[key] is None} == {*unknown, "edit_distance"}
    assert (single["tds"], single["ovs"], single["vps"], single["reward_variance"]) == (0.0, 0.0, 0.0, 0.0)


def test_metrics_and_weights(capsys, tmp_path):
    file = write_lines(tmp_path / "groups.jsonl", {"responses": [[1, 2, 3, 4], [1, 2, 9]]})
    (found,) = scores_of(capsys, file, "--metrics", "edit_distance, distinct-n", "--weights", "3,-1")
    assert found["edit_distance"] == 0.5
    assert found["vps"] == pytest.approx(3 * 0.5 - 1.0)
    (found,) = scores_of(capsys, file, "--metrics", "self-bleu")
    assert found["vps"] == found["tds"] > 0 and found["ovs"] is None


def test_model_tokenizer(capsys, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["<think>2 + 2</think>4<|im_end|>", "2 + 3 \ud83d", ""]
    ids = [tokenizer(text.replace("\ud83d", "?"), add_special_tokens=False)["input_ids"] for text in texts]
    assert [len(x) for x in ids] == [9, 7, 0]
    file = write_lines(tmp_path / "texts.jsonl", group(texts, prompt_id="x"), group(ids, prompt_id="x"))
    by_text, by_ids = scores_of(capsys, file, "--tokenizer", tmp_path / "model")
    assert by_text == by_ids and by_text["num_tokens"] == 16


def test_words_do_not_depend_on_the_batch(capsys, tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    groups = [
        group([" ".join(random.choice(list("abcdefg"), random.integers(0, 9))) for _ in range(random.integers(1, 6))])
        for _ in range(23)
    ]
    groups.insert(7, group([[3, 4, 5], [3, 4, 2**31 - 1]]))
    file = write_lines(tmp_path / "groups.jsonl", *groups)
    together = scores_of(capsys, file, "--tokenizer", "sacrebleu:13a")
    for size in (1, 40):
        monkeypatch.setattr(score, "BATCH_SIZE", size)
        assert scores_of(capsys, file, "--tokenizer", "sacrebleu:13a") == together


# --- streaming ---------------------------------------------------------------------------------------------------


def test_a_long_file_takes_little_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "BATCH_SIZE", 2000)
    random = np.random.default_rng(5)
    words = np.array([f"word{index}" for index in range(3000)])
    path = tmp_path / "long.jsonl"
    lines = [json.dumps(group([" ".join(random.choice(words, 1500))] * 2, [0, 1])) + "\n" for _ in range(40)]
    path.write_text("".join(lines))
    arguments = [path, "--tokenizer", "sacrebleu:char", "--output", tmp_path / "scores.jsonl"]
    short = write_lines(tmp_path / "short.jsonl", lines[0])
    assert run(capsys, short, *arguments[1:3])[0] == 0  # whatever is made once
    tracemalloc.start()
    try:
        assert run(capsys, *arguments)[0] == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 40


def test_gzip_and_standard_input(capsys, tmp_path, monkeypatch):
    text = "".join(json.dumps(group([[k, 2], [k]], [0, 1])) + "\n" for k in range(5))
    (tmp_path / "groups.jsonl").write_text(text)
    (tmp_path / "packed").write_bytes(gzip.compress(text.encode()))
    plain = scores_of(capsys, tmp_path / "groups.jsonl")
    assert len(plain) == 5 and scores_of(capsys, tmp_path / "packed") == plain
    for name in ("groups.jsonl", "packed"):
        with (tmp_path / name).open("rb") as raw:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
            assert scores_of(capsys, "-") == plain
    assert run(capsys, tmp_path / "packed", "--output", tmp_path / "scores.gz")[0] == 0
    packed = gzip.decompress((tmp_path / "scores.gz").read_bytes()).decode()
    assert [json.loads(line) for line in packed.splitlines()] == plain


def test_pipes_and_nothing_heavy():
    """As a user runs it: lines through a pipe, scores on stdout, totals on stderr, torch not imported."""
    program = (
        "import sys; from mmr1_ds.commands.cli import main; code = main(['score', *sys.argv[1:]]); "
        "heavy = {'torch', 'transformers', 'datasets', 'tqdm', 'scipy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "-", "--tokenizer", "sacrebleu:zh", "--output", "-"],
        input=json.dumps(group(["天气好", "天气 好"], [0, 1])), env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vps"] == pytest.approx(0.8 * 0.25)
    assert done.stderr.startswith("1 prompts, 2 responses, 6 tokens\nmean OVS 0.2500, TDS 0.0000, VPS 0.2000\n")


@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        ("| head -n 1 > /dev/null; exit ${PIPESTATUS[0]}", 141, ""),
        ("> /dev/full", 2, "mmr1-ds: error: stdout: cannot be written: No space left on device\n"),
    ],
)
def test_a_reader_that_goes_away_or_a_full_disk_is_no_crash(tmp_path, shell, code, told):
    file = write_lines(tmp_path / "groups.jsonl", *[GOOD] * 3000)
    command = f"{sys.executable} -m mmr1_ds.commands.cli score {file} --output - {shell}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, told)


# --- the table ---------------------------------------------------------------------------------------------------


def test_table_and_totals(capsys, tmp_path):
    groups = [group([[1], [2], [1], [1]], [1] * k + [0] * (4 - k), prompt_id=f"p{k}\n") for k in range(4)]
    file = write_lines(tmp_path / "groups.jsonl", *groups, group([[1], [2], [1], [1]], [None] * 4, prompt_id="none"))
    code, out, _ = run(capsys, file, "--top", 3)
    assert code == 0
    header, *rows = out.splitlines()
    assert re.split(r"  +", header) == ["prompt_id", "responses", "tokens", "pass rate", "OVS", "TDS", "VPS"]
    assert [row.split()[:5] for row in rows[:3]] == [
        ["p2?", "4", "4", "0.5000", "0.2500"], ["p1?", "4", "4", "0.2500", "0.1875"],
        ["p3?", "4", "4", "0.7500", "0.1875"],
    ]  # fmt: skip
    assert rows[3] == "(3 of 5, the highest VPS; --output has all)"
    assert rows[5] == "5 prompts, 20 responses, 20 tokens"
    mean_ovs = (0.25 + 2 * 0.1875) / 4
    assert rows[6].startswith(f"mean OVS {mean_ovs:.4f} (1 unknown), TDS ")
    assert rows[7] == "groups with reward variance: 75.0%"
    code, out, _ = run(capsys, file)
    assert out.splitlines()[5].split()[:5] == ["none", "4", "4", "-", "-"]  # all rows, the unknown one last
    assert "highest" not in out


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{nonsense", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ("[1, 2]", "must be a JSON object with responses and accuracies, got [1, 2]"),
        ('{"responses": [[1]], "accuracies": [NaN]}', "not JSON: NaN is no JSON number; write null"),
        ("[" * 100_000, "not JSON: "),
        ({"response": [[1]], "accuracies": [1]}, "key 'responses' is missing; there is \"response\", \"accuracies\""),
        ({"responses": [[1]]}, "key 'accuracies' is missing"),
        (group("text"), 'responses must be a list with one entry a response, got "text"'),
        (group([]), "responses must be a list of one response at least, got []"),
        (group([[1], "a"]), "responses mixes text and token ids"),
        (group([[1], 7]), "responses[1] must be text or a list of ids, got 7"),
        (group(["a", "b"]), "responses are text, which takes a tokenizer; add --tokenizer"),
        (group([[1, 2], [1, -100]]), "responses[1][1] must be a token id, a whole number in 0..2147483647, got -100; "),
        (group([[1, 2**31]]), "responses[0][1] must be a token id, a whole number in 0..2147483647, got 2147483648"),
        (group([[1, 2.0]]), "responses[0][1] must be a token id, a whole number in 0..2147483647, got 2.0"),
        (group([[True]]), "responses[0][0] must be a token id, a whole number in 0..2147483647, got true"),
        (group([["x" * 10**6]]), 'responses[0][0] must be a token id, a whole number in 0..2147483647, got "xxxxx"; '),
        (group([[1], [2]], [1]), "accuracies has 1 values for 2 responses"),
        (group([[1], [2]], {}), "accuracies must be a list with one entry a response, got {}"),
        (group([[1], [2]], [0, 1.5]), "accuracies[1] must be in [0, 1], got 1.5"),
        (group([[1], [2]], [0, "yes"]), 'accuracies[1] must be a number that fits 32 bits, got "yes"'),
        (group([[1], [2]], rewards=[1, None]), "rewards[1] is null; give a number, or leave rewards out"),
        (group([[1], [2]], rewards=[1, 1e300]), "rewards[1] must be a number that fits 32 bits, got 1e+300"),
        (group([[1]], prompt_id=[1]), "prompt_id must be a string or a whole number, got [1]"),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_by_file_and_number(capsys, tmp_path, line, told):
    file = write_lines(tmp_path / "groups.jsonl", GOOD, "\n", line, "\n")
    message = mistake(capsys, file, "--output", tmp_path / "scores.jsonl")
    assert message.startswith(f"{file} line 3: {told}")
    assert [path.name for path in tmp_path.iterdir()] == ["groups.jsonl"]  # nothing of the good line either


def test_bad_files(capsys, tmp_path):
    assert mistake(capsys, tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: cannot be read: No such file or directory"
    assert mistake(capsys, tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    empty = write_lines(tmp_path / "empty.jsonl", "\n")
    assert mistake(capsys, empty, "--output", tmp_path / "out") == f"{empty}: holds no groups of responses"
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'{"responses": ["caf\xe9"]}')
    assert mistake(capsys, tmp_path / "latin.jsonl") .startswith(f"{tmp_path}/latin.jsonl line 2: not JSON: 'utf-8'")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(GOOD.encode() * 5)[:-9])
    assert mistake(capsys, tmp_path / "cut.gz").startswith(f"{tmp_path}/cut.gz line ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--metrics", "learnabilty"], "--metrics: unknown metric 'learnabilty'; known: learnability, "),
        (["--metrics", "self-bleu", "--weights", "1,2"], "--weights must have one weight a metric, 1 for "),
        (["--weights", "1,nan"], "--weights must be finite numbers, got nan"),
        (["--weights", "1;2"], "--weights: '1;2' is no number"),
        (["--top", "0"], "--top must be at least 1, got 0"),
        (["--tokenizer", "sacrebleu:moses"], "--tokenizer: unknown 'sacrebleu:moses'; known: sacrebleu:13a, "),
        (["--tokenizer", ""], "--tokenizer: '' is empty; give a model's folder, a hub name or sacrebleu:13a"),
        (["--tokenizer", "/no/model"], "--tokenizer: '/no/model' is no folder; give a model's folder, "),
        (["--output", "no/such/folder"], "--output no/such/folder: must be a file in a folder that exists"),
    ],
)
def test_bad_options(capsys, tmp_path, arguments, told):
    assert mistake(capsys, write_lines(tmp_path / "groups.jsonl", GOOD), *arguments).startswith(told)


def test_a_folder_that_is_no_tokenizer(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"--tokenizer '.*/model' cannot be loaded: .*sacrebleu:13a") as raised:
        open_tokenizer(str(tmp_path / "model"))
    assert "\n" not in str(raised.value)


# --- the output file ---------------------------------------------------------------------------------------------


def test_the_output_is_never_overwritten_unasked(capsys, tmp_path):
    file = write_lines(tmp_path / "groups.jsonl", GOOD)
    output = tmp_path / "scores.jsonl"
    output.write_text("mine")
    assert mistake(capsys, file, "--output", output) == f"--output {output}: exists; add --force to overwrite it"
    assert output.read_text() == "mine"
    code, out, _ = run(capsys, file, "--output", output, "--force")
    assert code == 0 and out.startswith("1 prompts, 2 responses, 3 tokens\n")
    assert json.loads(output.read_text())["num_tokens"] == 3
    told = mistake(capsys, file, "--output", file, "--force")
    assert told == f"--output {file}: is the file that is read; give another"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_run_leaves_the_old_output(capsys, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "groups.jsonl", GOOD, GOOD)
    output = tmp_path / "scores.jsonl"
    output.write_text("old")
    monkeypatch.setattr(score, "BATCH_SIZE", 1)
    genuine, calls = score.score_groups, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            assert len(list(tmp_path.iterdir())) == 3  # the first score is being written, under another name
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(score, "score_groups", interrupted)
    code, out, err = run(capsys, file, "--output", output, "--force")
    assert (code, out, err) == (130, "", "mmr1-ds: interrupted\n")
    assert output.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_a_link_is_followed(capsys, tmp_path):
    file = write_lines(tmp_path / "groups.jsonl", GOOD)
    target, link = tmp_path / "target.jsonl", tmp_path / "link"
    link.symlink_to(target)
    assert run(capsys, file, "--output", link)[0] == 0  # it leads to nothing yet
    target.write_text("old")
    assert run(capsys, file, "--output", link, "--force")[0] == 0
    assert link.is_symlink() and json.loads(target.read_text())["num_tokens"] == 3
    (tmp_path / "back").symlink_to(file)
    told = mistake(capsys, file, "--output", tmp_path / "back", "--force")
    assert told == f"--output {tmp_path}/back: is the file that is read; give another"


# --- documentation -----------------------------------------------------------------------------------------------


def test_the_documentation_s_example(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "scoring.md").read_text()
    (lines,) = re.findall(r"```jsonl\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    (tmp_path / "responses.jsonl").write_text(lines)
    table, scored = [run(capsys, *line.split()[2:]) for line in commands.splitlines() if line]
    assert table[1].splitlines()[:-1] == shown.splitlines()[:-1] and scored[0] == 0  # but for the time taken
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == len(lines.splitlines())


def test_the_help_s_example(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["score", "--help"])
    examples = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith('  {"')]
    file = write_lines(tmp_path / "groups.jsonl", *[line + "\n" for line in examples])
    assert [found["prompt_id"] for found in scores_of(capsys, file, "--tokenizer", "sacrebleu:13a")] == ["a", "b"]
    fields = set(scores_of(capsys, file, "--tokenizer", "sacrebleu:13a")[0])
    assert all(re.search(rf"\b{field}\b", score.FORMAT) for field in fields - {"vps", "ovs", "tds"})
