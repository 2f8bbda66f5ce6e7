"""The report: what stands in the page against what the run holds, whatever the run is called."""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import files_of, lines, messages, refused, with_
from PIL import Image
from scipy.spatial.distance import cdist

from ddpm_jax import load, to_uint8
from ddpm_jax.calls.programs import advance
from ddpm_jax.cli import main
from ddpm_jax.config import from_dict, to_dict
from ddpm_jax.ddpm import DDPM
from ddpm_jax.report import chain, curves, drawn
from ddpm_jax.report.drawn import Near
from ddpm_jax.report.nearest import verdict
from ddpm_jax.report.pictures import fit, tiles
from ddpm_jax.report.real import read_real
from ddpm_jax.report.run import read_runs
from ddpm_jax.report.write import report


class Page(html.parser.HTMLParser):
    """A page as a browser's parser sees it."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self.texts = []
        self.scripts = []
        self.within = []
        self.content = path.read_text()
        self.feed(self.content)
        self.text = " ".join(" ".join(self.texts).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.within.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.within.pop()

    def handle_data(self, data):
        if self.within == ["script"]:
            self.scripts.append(data)
        elif not self.within:
            self.texts.append(data)

    def of(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]

    def chart(self, name):
        (found,) = [each for each in self.data["charts"] if each["id"] == f"chart-{name}"]
        return found

    def slider(self, name):
        (found,) = [each for each in self.data["sliders"] if each["id"] == name]
        return found


def page_of(*runs, out, **options):
    return Page(report([str(run) for run in runs], out / "page.html", **options))


def quiet(*runs, out):
    """The page without anything computed."""
    return page_of(*runs, out=out, compute="none")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The page of the run that all tests share, samples and neighbours computed."""
    return page_of(run, out=tmp_path_factory.mktemp("page"))


def rewrite(run, **groups):
    """Changes the config of a run."""
    file = run / "config.json"
    config = from_dict(json.loads(file.read_text()))
    file.write_text(json.dumps(to_dict(with_(config, **groups))))


def decoded(uri):
    """The pixels of a picture in the page."""
    head, _, content = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_the_page_holds_what_the_run_does(page, run):
    ddpm, params = load(run)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"{count:,} parameters" in page.text and "finished: 2 steps" in page.text
    assert "48 images" in page.text and "10 steps, schedule linear" in page.text
    logged = lines(run)
    for name in ("loss", "grad_norm", "images_per_s", "holdout_loss"):
        (line,) = page.chart(name)["lines"]
        there = {each["step"]: each[name] for each in logged if name in each}
        assert line["x"] == list(there)
        np.testing.assert_allclose(line["y"], list(there.values()), rtol=1e-5)
    last = [each for each in logged if "holdout_bands" in each][-1]
    (line,) = page.chart("bands")["lines"]
    assert line["x"] == [i + 0.5 for i in range(10)]
    known = [(a, b) for a, b in zip(line["y"], last["holdout_bands"], strict=True) if b is not None]
    np.testing.assert_allclose(*zip(*known, strict=True), rtol=1e-5)
    for name in ("likelihood", "evaluate", "calibrate", "tune", "figure codec"):
        assert f"ddpm-jax {name} {run}" in page.text, name
    assert f"ddpm-jax evaluate {run} -n 48" in page.text
    for value in ("learning_rate", str(ddpm.config.data.source), "0.001"):
        assert value in page.text


def test_nothing_is_asked_for_from_outside(page):
    assert len(page.content) < 5e6
    links = [
        attrs[name] for _, attrs in page.elements for name in ("src", "href") if attrs.get(name)
    ]
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert links and all(each.startswith("data:") or each[1:] in ids for each in links)
    assert "url(" not in page.content and "@import" not in page.content
    (policy,) = [
        each["content"] for each in page.of("meta") if each.get("http-equiv", "").startswith("C")
    ]
    hashed = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{hashed}'" in policy


def test_all_that_is_seen_has_words(page):
    assert page.of("img") and all(each["alt"] for each in page.of("img"))
    labelled = {each["for"] for each in page.of("label")}
    assert {each["id"] for each in page.of("input")} <= labelled
    plots = [each for each in page.of("div") if each.get("role") == "img"]
    assert plots and all(" at step 2." in each["aria-label"] for each in plots[:4])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_grids_are_the_runs(page, run):
    (file,) = (run / "samples").iterdir()
    drawn_there = np.asarray(Image.open(file).convert("RGB"))
    (picture,) = [each for each in page.of("img") if each.get("id") == "grids-0"]
    np.testing.assert_array_equal(decoded(picture["src"]), drawn_there)
    assert page.slider("grids")["positions"] == ["step 2"]


def test_sheets_of_real_images_show_training_images(page, run, pictures):
    (image,) = [each["src"] for each in page.of("img") if "real images" in each["alt"]]
    sheet = decoded(image)[..., 0]
    real = read_real(read_runs([str(run)])[0])
    assert real.is_same and len(real.train) + real.held_out == len(pictures)
    np.testing.assert_array_equal(sheet[1:9, 1:9], pictures[real.train[0], ..., 0])
    np.testing.assert_array_equal(sheet[1:9, 10:18], pictures[real.train[1], ..., 0])


def test_the_chain_is_the_samplers_and_sees_what_the_network_sees(run):
    ddpm, params = load(run)
    rng = jax.random.key(5)
    before = advance._cache_size()
    found = chain.trace(ddpm, params, rng, 3)
    assert advance._cache_size() <= before + 1  # One program for all steps.
    assert list(found.t) == list(range(10, -1, -1))
    np.testing.assert_allclose(
        found.x[-1], ddpm.sample(params, rng, 3, sampler="ddim", steps=10), atol=1e-5
    )
    np.testing.assert_allclose(np.clip(found.x_0[-1], -1, 1), found.x[-1], atol=1e-6)
    alphas_bar = np.cumprod(1 - np.linspace(0.01, 0.5, 10))
    for frame, t in enumerate(found.t[:-1] - 1):  # Eq. 15, with the clipped x_0.
        eps = np.asarray(ddpm.denoise(params, found.x[frame], np.full(3, t, np.int32)))
        x_0 = (found.x[frame] - np.sqrt(1 - alphas_bar[t]) * eps) / np.sqrt(alphas_bar[t])
        np.testing.assert_allclose(found.x_0[frame], np.clip(x_0, -1, 1), atol=2e-4)


def test_the_chain_in_the_page_goes_from_noise_to_the_samples(page, run):
    slider = page.slider("chain-0")
    assert slider["positions"][0] == "t = 10 of 10, pure noise"
    assert slider["positions"][-1] == "t = 0, the image" and len(slider["positions"]) == 11
    noisy, predicted = slider["shows"]
    assert noisy["frames"] == predicted["frames"] == list(range(11))
    assert noisy["uris"][-1] is None  # It stands in the page.
    (image,) = [each["src"] for each in page.of("img") if each.get("id") == "chain-0-0"]
    ddpm, params = load(run)
    samples = to_uint8(ddpm.sample(params, jax.random.key(0), 8, sampler="ddim", steps=10))
    np.testing.assert_allclose(decoded(image)[1:9, 1:9, 0], samples[0, ..., 0], atol=1)
    assert len({uri for uri in noisy["uris"] if uri}) == 10


def test_neighbours_are_the_nearest_of_all_training_images(run, pictures):
    one = read_runs([str(run)])[0]
    real = read_real(one)
    found = drawn.draw(one, real)
    train = pictures[real.train].astype(np.float64)
    own = found.x[-1].astype(np.float64).reshape(8, -1)
    both = [cdist(own, each.reshape(len(train), -1)) for each in (train, train[:, :, ::-1])]
    nearest = np.sort(np.minimum(*both), axis=1)[:, : drawn.NEAREST]  # The run has flips.
    np.testing.assert_allclose(found.near.distance, nearest / np.sqrt(64), atol=0.6)
    assert set(found.near.index.flat) <= set(real.train)


def test_the_page_names_the_nearest_images_and_gives_the_verdict(page, run):
    one = read_runs([str(run)])[0]
    near = drawn.draw(one, read_real(one)).near
    best = near.distance[:, 0].argmin()
    smallest = f"{near.distance.min():.1f}"
    said = f"The nearest of these 8 is at {smallest} from training image no. {near.index[best, 0]}"
    # The explanation stands before the table.
    assert page.text.index(said) < page.text.index("Samples and their nearest training images")
    assert "Mirrored images count too." in page.text  # The run has flips.
    cells = re.findall(r"(\d+\.\d) no\. (\d+)", page.text)
    assert [int(no) for _, no in cells] == near.index.flatten().tolist()
    assert [at for at, _ in cells] == [f"{at:.1f}" for at in near.distance.flat]
    assert (
        f"Nearest training image {smallest} is the smallest distance of 8 samples; between "
        f"training images it is {near.typical:.1f} in the median;"
    ) in page.text
    assert not any("title" in each for each in page.of("img"))  # These have no names.


def test_the_summary_has_no_nearest_image_where_none_was_searched(run, tmp_path):
    assert "Nearest training image " not in quiet(run, out=tmp_path).text


def test_images_of_a_folder_are_named(copy, tmp_path, pictures):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels[..., 0]).save(folder / f"<{i}>.png")
    page = page_of(copy, out=tmp_path, data=f"folder:{folder}")
    near = [each for each in page.of("img") if each["alt"].startswith("training image")]
    names = sorted(f"<{i}>.png" for i in range(len(pictures)))
    assert near and all(
        each["title"] == names[int(each["alt"].removeprefix("training image "))] for each in near
    )


@pytest.mark.parametrize(
    ("typical", "distance", "says"),
    [
        (
            30,
            [31, 10.1],
            "The nearest of these 2 is at 10.1 from training image no. 1, and a copy ",
        ),
        (30, [31, 10.1], "none is a copy pixel for pixel</strong>. Nearer than 10.0, a third of"),
        (
            30,
            [31, 9.9],
            "1 of these 2 is a copy, or nearly one</strong>: sample 2 of no. 1 (at 9.9). Near",
        ),
        (
            30,
            [0, 9.9],
            "2 of these 2 are copies, or nearly so</strong>: sample 1 of no. 0 (at 0.0), ",
        ),
        (0.03, [0.02, 0.03], "at 0.0200 from training image no. 0, and a copy would be near 0"),
        (np.nan, [0, 1], "at 0.0 from training image no. 0. Without a distance between"),
        (0, [0, 1], "at 0.0 from training image no. 0. Without a distance between"),
    ],
)
def test_a_sample_nearer_than_a_third_of_the_median_counts_as_a_copy(typical, distance, says):
    column = np.array(distance, np.float64)[:, None]
    index = np.arange(len(column))[:, None]
    assert says in verdict(Near(np.zeros(0), index, column, float(typical), ""))


def test_the_summary_shows_the_likelihood_that_the_section_says(copy, tmp_path):
    part = {"step": 2, "weights": "raw", "split": "holdout", "draws": 1}
    numbers = dict.fromkeys(("rate", "prior", "distortion", "rmse"), 1.0)
    found = {"few": {"images": 4, "total": 5.0}, "more": {"images": 6, "total": 6.0}}
    said = "The Summary shows the first row"
    for i, (name, summary) in enumerate(found.items()):
        (copy / "likelihood" / name).mkdir(parents=True)
        content = json.dumps({**part, **numbers, **summary})
        (copy / "likelihood" / name / "likelihood.json").write_text(content)
        page = quiet(copy, out=tmp_path)
        assert (said in page.text) == (i == 1)  # One row needs no words.
    assert "Bits per dimension (bits/dim) at most 6.000 for 6 holdout images" in page.text
    assert page.text.index("6 of holdout") < page.text.index("4 of holdout")
    assert "draws repeats the measurement" in page.text and "ema weights are" not in page.text


def test_a_likelihood_is_shown_with_its_curves(copy, tmp_path):
    assert main(["likelihood", str(copy), "--split", "train", "--images", "8"]) == 0
    page = quiet(copy, out=tmp_path)
    (file,) = copy.glob("likelihood/*/likelihood.json")
    summary = json.loads(file.read_text())
    assert f"at most {summary['total']:.3f}" in page.text
    assert f"≤ {summary['total']:.4f} ±" in page.text and "each number takes 8 bits" in page.text
    assert "ema weights are the average of the weights" in page.text
    (terms,) = page.chart("terms")["lines"]
    (rates,) = page.chart("rates")["lines"]
    assert terms["x"] == list(range(10))
    np.testing.assert_allclose(sum(terms["y"]) + summary["prior"], summary["total"], rtol=1e-4)
    np.testing.assert_allclose(rates["x"][-1], summary["rate"], rtol=1e-6)
    np.testing.assert_allclose(rates["y"][-1], summary["rmse"], rtol=1e-5)


RESULT = {
    "step": 2,
    "weights": "ema",
    "sampler": "ddim",
    "steps": 5,
    "samples": 64,
    "values": {
        "fid_train": {"title": "FID (train)", "value": 12.25, "error": 0.5, "error_is": "jackknife"}
    },
    "paper": {"fid_train": "3.17"},
}


def test_an_evaluation_is_shown_with_its_errors_and_the_papers(copy, tmp_path):
    folder = copy / "evaluation" / "00000002-ema-ddim-5-seed0"
    folder.mkdir(parents=True)
    (folder / "inception-64-abc.json").write_text(json.dumps(RESULT))
    text = quiet(copy, out=tmp_path).text
    assert "64 samples, ddim of 5 steps, ema weights of step 2" in text
    assert "FID (train) 12.25 ± 0.5 jackknife 3.17" in text
    assert f"ddpm-jax evaluate {copy}" not in text


HOSTILE = "a\"b'<img src=x onerror=alert(1)><"


def test_names_and_values_of_a_run_are_text(run, tmp_path):
    """The name holds </script>: a folder whose name ends in < before one that begins so.

    Both parts belong to it, since the last is that of another run, too.
    """
    last = "script><script>alert(2)<!--"
    home = shutil.copytree(run, tmp_path / HOSTILE / last)
    rewrite(home, data={"class_names": ("</script><b>", "{{data}}", "\u2028\"'&amp;")})
    other = shutil.copytree(run, tmp_path / "two" / last)
    page = quiet(home, other, out=tmp_path)
    assert page.text.count(HOSTILE) >= 2 and "</script><b>" in page.text
    assert "{{data}}" in page.text and "&amp;" in page.text
    assert len(page.scripts) == len(page.of("script")) == 2
    assert not [each for each in page.of("img") if "onerror" in each] and not page.of("b")
    assert page.data["runs"] == [f"{HOSTILE}/{last}", f"two/{last}"]


def test_a_path_that_is_no_text_is_shown_with_escapes(run, tmp_path):
    home = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(run, home)
    assert "Run caf\\xe9" in quiet(home, out=tmp_path).text


def test_several_runs_are_laid_over_each_other(run, copy, tmp_path):
    rewrite(copy, optim={"learning_rate": 0.5}, train={"steps": 9})
    (copy / "metrics.jsonl").write_text('{"step": 5, "loss": 0.125}\n{"step": 7, "loss": 0.25}\n')
    Image.new("L", (8, 8), 77).save(copy / "samples" / "00000007.png")
    page = quiet(run, copy, out=tmp_path)
    first, second = page.chart("loss")["lines"]
    assert (first["label"], second["label"]) == ("tiny", "copy")
    assert (second["run"], second["x"], second["y"]) == (1, [5, 7], [0.125, 0.25])
    table = re.search(r'<table class="differences">.*?</table>', page.content, re.S)[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == [
        "optim.learning_rate",
        "train.steps",
    ]
    assert re.findall(r"<code>(.*?)</code>", table) == ["0.001", "0.5", "2", "9"]
    # At step 7 the first run still shows its last grid, at step 2 both show theirs.
    grids = page.slider("grids")
    assert grids["positions"] == ["step 2", "step 7"]
    assert [show["frames"] for show in grids["shows"]] == [[0, 0], [0, 1]]
    assert "step 7 of 9" in page.text


def test_runs_with_the_same_last_name_are_told_apart(run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name / "run")
    page = quiet(tmp_path / "a" / "run", tmp_path / "b" / "run", out=tmp_path)
    assert page.data["runs"] == ["a/run", "b/run"]
    assert "All settings of these runs are the same" in page.text


def test_a_run_that_has_just_begun(copy, tmp_path):
    for name in ("samples", "checkpoints"):
        shutil.rmtree(copy / name)
    (copy / "metrics.jsonl").unlink()
    page = page_of(copy, out=tmp_path)  # Nothing can be computed yet.
    for words in (
        "no checkpoint yet",
        "There are none yet",
        "has only just begun",
        "no line in the log",
        "No line of the log has it yet",
    ):
        assert words in page.text, words
    assert page.data["sliders"] == []


def test_a_line_that_is_being_written_is_no_fault_and_a_damaged_one_is_named(copy, tmp_path):
    file = copy / "metrics.jsonl"
    whole = b'{"step": 4, "loss": 0.5, "holdout_loss": NaN}\n'
    file.write_bytes(whole + b'{"step": 6, "lo')
    page = quiet(copy, out=tmp_path)
    assert page.chart("loss")["lines"][0]["y"] == [0.5] and "damaged" not in page.text
    file.write_bytes(whole + b'{"st\xff\x00\n[]\n{"step": 6, "loss": 0.25}\n')
    page = quiet(copy, out=tmp_path)
    assert page.chart("loss")["lines"][0]["y"] == [0.5, 0.25]
    assert "metrics.jsonl: 2 lines are damaged and left out of the curves" in page.text


def test_damaged_results_are_named_and_the_rest_is_shown(copy, tmp_path, caplog):
    (copy / "run.json").write_text("{")
    files = {
        "likelihood/a/likelihood.json": b'{"total": "x"}',
        "likelihood/b/likelihood.json": b"\xff",
        "evaluation/a/proxy-1-2.json": b'{"values": {"is": 3}}',
        "calibration.npz": b"no npz",
        "tuned.json": b"[]",
        "samples/00000001.png": b"\x89PNG",
        "figures/steps.png": b"",
    }
    for name, content in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    page = quiet(copy, out=tmp_path)
    for name in files:
        assert f"{copy / name}: " in page.text, name
    assert f"{copy / 'run.json'}: cannot be read" in page.text and page.chart("loss")["lines"]
    assert all("\n" not in each for each in messages(caplog))


def test_images_that_are_gone_are_said_to_be(copy, tmp_path):
    rewrite(copy, data={"source": f"npz:{tmp_path}/gone.npz"})
    page = page_of(copy, out=tmp_path)
    assert "The images cannot be shown now: data: cannot read" in page.text
    assert "Not searched: data: cannot read" in page.text
    assert page.slider("chain-0")  # They are drawn without them.


def test_other_images_are_told_from_those_of_the_training(copy, tmp_path, pictures):
    np.savez(tmp_path / "other.npz", images=pictures[::-1])
    page = quiet(copy, out=tmp_path)
    assert "They are not known to be those of the training" not in page.text
    page = page_of(copy, out=tmp_path, compute="none", data=f"npz:{tmp_path}/other.npz")
    assert "They are not known to be those of the training" in page.text


def test_many_grids_are_thinned_and_the_page_says_so(copy, tmp_path):
    for step in range(3, 43):
        Image.new("L", (8, 8), step).save(copy / "samples" / f"{step:08d}.png")
    page = quiet(copy, out=tmp_path)
    positions = page.slider("grids")["positions"]
    assert len(positions) == 24 and (positions[0], positions[-1]) == ("step 2", "step 42")
    assert "copy: 24 of its 41 grids, evenly spread." in page.text


def test_pictures_keep_within_their_bytes(rng):
    noise = [rng.integers(0, 256, (96, 80, 3), dtype=np.uint8) for _ in range(3)]
    for most in (100_000, 40_000, 3_000):
        found = fit(noise, most)
        sizes = [len(base64.b64decode(each.uri.partition(",")[2])) for each in found.each]
        assert sum(sizes) <= most
        assert {(each.width, each.height) for each in found.each} == {(80, 96)}
        exact = most == 100_000
        assert (found.words == "") == exact
        if exact:
            for image, each in zip(noise, found.each, strict=True):
                np.testing.assert_array_equal(decoded(each.uri), image)
    assert "at 1/" in found.words and "with losses" in found.words
    wide = fit([np.zeros((2, 20_000, 1), np.uint8)], 1_000_000)
    assert decoded(wide.each[0].uri).shape[1] == 10_000


def test_tiles_stand_in_rows_with_white_lines_between(rng):
    images = rng.integers(0, 255, (5, 2, 3, 4), dtype=np.uint8)
    picture = tiles(images, 3)
    assert picture.shape == (1 + 2 * 3, 1 + 3 * 13, 1)
    for i, image in enumerate(images):
        top, left = 1 + i // 3 * 3, 1 + i % 3 * 13
        for channel in range(4):  # Side by side, since four are no colours.
            part = picture[top : top + 2, left + 3 * channel : left + 3 * channel + 3, 0]
            np.testing.assert_array_equal(part, image[..., channel])
    inside = 5 * 2 * 3 * 4
    assert (picture == 255).sum() == picture.size - inside
    assert tiles(images[..., :3], 5).shape == (4, 21, 3)


def test_many_figures_are_cut_and_the_page_says_so(copy, tmp_path):
    (copy / "figures").mkdir()
    for i in range(14):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(copy / "figures" / f"own{i:02d}.png")
    page = quiet(copy, out=tmp_path)
    assert "figures/own11.png" in page.text and "own12" not in page.text
    assert "The folder figures/ has 2 more." in page.text
    assert "with samples of its own" in page.text


def test_thinned_curves_keep_their_ends():
    curve = {step: float(step**2) for step in range(0, 10_000, 10)}
    thin = curves.thinned(curve, 50)
    assert len(thin) == 50 and thin.items() <= curve.items()
    assert (min(thin), max(thin)) == (0, 9990) and np.ptp(np.diff(list(thin))) <= 10
    assert curves.thinned(curve, 1000) is curve


def test_a_report_changes_nothing_in_the_run(copy, tmp_path):
    before = files_of(copy)
    page_of(copy, out=tmp_path)
    assert files_of(copy) == before


def test_the_command_writes_the_page(run, copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(copy), "--compute", "none"]) == 0
    assert "report: report.html" in capsys.readouterr().err
    assert Page(tmp_path / "report.html").data["runs"] == ["tiny", "copy"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "RUN"),
        (["/nowhere"], "/nowhere: not a run directory"),
        (["{tmp}"], "not a run directory, which a report is of; name the folder that ddpm-jax"),
        (["{run}", "{run}/"], "is named twice; name each run once"),
        (["{run}", "{run}/../{run.name}"], "is named twice; name each run once"),
        (["{run}", "--out", "report.pdf"], "out: must end in .html"),
        (["{run}", "--out", "{tmp}"], "out: must end in .html"),
        (["{run}", "--out", "/dev/null/x.html"], "cannot be written"),
        (["{run}", "--compute", "all"], "invalid choice 'all'"),
        (["{run}", "--compute", "none", "--data", "folder:/gone"], "/gone does not exist"),
        (["{run}"] * 9, "runs: must have at most 8 entries, got 9"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, run, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, "report", *(arg.format(run=run, tmp=tmp_path) for arg in args))
    assert not list(tmp_path.iterdir())


def test_a_damaged_config_is_one_line(capsys, copy):
    (copy / "config.json").write_text('{"train": {"stepz": 3}}')
    assert "train.stepz: unknown field" in refused(capsys, "report", copy)


def test_weights_that_cannot_be_read_leave_the_samples_out(copy, tmp_path):
    shutil.rmtree(copy / "checkpoints" / "2" / "ema_params")
    page = page_of(copy, out=tmp_path)
    assert "Not drawn: " in page.text and f"ddpm-jax figure progressive {copy}" in page.text


def test_the_chain_of_a_model_with_classes_has_them(tiny):
    ddpm = DDPM(with_(tiny, model={"num_classes": 3}, diffusion={"num_timesteps": 2}))
    rng = jax.random.key(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(rng, leaf.shape), ddpm.init(rng)
    )
    labels = np.array([0, 1, 2], np.int32)
    given = chain.trace(ddpm, params, rng, 3, labels).x[-1]
    np.testing.assert_allclose(
        given, ddpm.sample(params, rng, 3, sampler="ddim", labels=labels), atol=1e-5
    )
    assert np.abs(given - chain.trace(ddpm, params, rng, 3, labels[::-1]).x[-1]).max() > 1e-3
