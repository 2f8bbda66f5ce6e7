"""The notebook runs from top to bottom, with a shorter training: four minutes on two cores."""

import ast
import re
import shutil
from pathlib import Path

import pytest
from conftest import HANG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAINING = "STEPS = (100, 1000, 4500)"
SHORTER = "STEPS = (100, 400)"

# What the pictures show, in numbers. The real digit that is nearest to a drawn one names it.
SEEN = """
def names(drawn):
    squares = [np.square(digit - each).sum(axis=(1, 2, 3)) for each in drawn]
    return [int(source.labels[each.argmin()]) for each in squares]

def rmses(rows):
    return [float(127.5 * np.sqrt(np.mean((row - pieces) ** 2))) for row in rows]

print({
    "weight": [float(abs(costs[1:] / (weight[1:] * 0.1**2 / np.log(2)) - 1).max())],
    "levels": {steps: [float(each) for each in curve] for steps, curve in curves.items()},
    "parts": [float(bound.total.mean()), float(bound.prior.mean()), float(terms.sum())],
    "distortion": [float(each) for each in distortion],
    "ignored": names(guided[0]),
    "guided": names(guided[3]),
    "known": bool((filled[:, :14] == pieces[:, :14]).all()),
    "filled": float(abs(filled[:, 14:] - pieces[:, 14:]).mean()),
    "prefixes": rmses(rows),
})
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The notebook after it was run in a folder of its own, beside a copy of the examples."""
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "examples", folder / "examples")
    read = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    for cell in read.cells:
        if TRAINING in cell.source:
            cell.source = cell.source.replace(TRAINING, SHORTER)
    read.cells.append(nbformat.v4.new_code_cell(SEEN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # one device, and XLA's optimisations
        client = NotebookClient(read, timeout=HANG, resources={"metadata": {"path": str(folder)}})
        client.execute()  # raises CellExecutionError
    return read


@pytest.fixture(scope="module")
def said(notebook):
    """What its cells print."""
    return "".join(
        output.text
        for cell in notebook.cells[:-1]
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )


@pytest.fixture(scope="module")
def seen(notebook):
    """What its pictures show."""
    return ast.literal_eval(notebook.cells[-1].outputs[0].text)


def numbers(said, start):
    """The numbers in the line that begins with `start`."""
    (line,) = [line for line in said.splitlines() if line.startswith(start)]
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", line[len(start) :])]


def test_the_training_was_shortened(seen):
    assert list(seen["levels"]) == [0, 100, 400]


def test_no_cell_warns(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "stderr" not in {output.get("name") for cell in cells for output in cell.outputs}


def test_sampling_agrees_with_the_formulas(said):
    assert numbers(said, "Eq. 2, 300 times:") == pytest.approx(
        numbers(said, "Eq. 4, once:"), abs=0.02
    )
    mean, deviation = numbers(said, "kept pairs:")
    expected_mean, expected_deviation = numbers(said, "Eq. 7:")
    assert mean == pytest.approx(expected_mean, abs=0.001)
    assert deviation == pytest.approx(expected_deviation, rel=0.05)


def test_the_weight_of_an_error_is_that_of_eq_12(seen):
    assert seen["weight"][0] < 0.001


def test_the_loss_falls_where_the_image_can_be_seen(seen):
    fresh, early, last = seen["levels"].values()
    assert fresh == pytest.approx([1.0] * len(fresh), abs=0.05)
    assert sum(last) < sum(early) < sum(fresh)
    assert last[-1] < 0.1 < 0.5 < last[0]


def test_the_terms_sum_to_the_bound_and_the_model_knows_something(seen):
    total, prior, terms = seen["parts"]
    assert total == pytest.approx(prior + terms, rel=1e-4)
    assert 1 < total < 4.0  # log2 17 is 4.09
    assert 0 < prior < 1e-3
    assert seen["distortion"][-1] < 5 < 50 < seen["distortion"][0]


def test_guidance_draws_what_it_is_asked_for(seen):
    right = [name == label for label, name in enumerate(seen["guided"])]
    ignored = [name == label for label, name in enumerate(seen["ignored"])]
    assert sum(right) >= 9 and sum(ignored) <= 5


def test_known_pixels_stay_and_the_others_are_new(seen):
    assert seen["known"] and seen["filled"] > 0.02


def test_tuned_steps_are_nearer_than_ddim(said):
    ddim = numbers(said, "DDIM, 10 steps: RMSE")[0]
    assert numbers(said, "tuned, 10 steps: RMSE")[0] < 0.7 * ddim


def test_more_bytes_make_a_nearer_picture(seen):
    assert seen["prefixes"] == sorted(seen["prefixes"], reverse=True)
    assert seen["prefixes"][-1] < 12
