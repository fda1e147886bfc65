"""The report: what a reader is told, what is refused, and that the page stands alone."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from result_factory import make_comparisons, make_provenance, make_result

from lbp_ray.report import render_console, write_report
from lbp_ray.report.__main__ import main
from lbp_ray.report.curves import draw_precision_recall
from lbp_ray.report.theme import COLOURS
from lbp_ray.report.verdict import comparison, verdict_sentences
from lbp_ray.report.words import METRIC_LABELS
from lbp_ray.result import METRIC_NAMES, BayesReference, Confusion, Interval

FIGURES = {"overview", "metrics", "roc", "precision_recall", "scores", "learning", "confusion", "folds", "permutation"}
VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "stop", "rect"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)


class Page(HTMLParser):
    """Collects what the assertions ask of a page, and the tags that do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.headings, self.faults, self.text = [], [], [], [], ""
        self.references, self._open = [], []
        self.feed(text)
        self.faults += [f"never closed: {tag}" for tag in self._open]

    def handle_starttag(self, tag, attributes):
        self.note(tag, dict(attributes))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, dict(attributes))

    def note(self, tag, attributes):
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        if tag not in VOID and (not self._open or self._open.pop() != tag):
            self.faults.append(f"misplaced </{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(result, folder, contact_sheet=PNG)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def with_part(result, index=0, **changes):
    parts = list(result.slice_counts)
    parts[index] = parts[index].model_copy(update=changes)
    return result.model_copy(update={"slice_counts": tuple(parts)})


def with_metric(result, name, index=0, **changes):
    held = result.slice_counts[index].metrics
    metrics = tuple(metric.model_copy(update=changes) if metric.name == name else metric for metric in held)
    return with_part(result, index, metrics=metrics)


def with_auc(result, *bounds):
    for index, (low, high) in enumerate(bounds):
        interval = Interval(estimate=(low + high) / 2, low=low, high=high, level=0.95, method="bootstrap")
        result = with_metric(result, "roc_auc", index, interval=interval)
    return result


def test_page_shows_every_metric_with_its_figures(page, result):
    for part in result.slice_counts:
        for metric in (*part.metrics, part.accuracy):
            interval = metric.interval
            assert METRIC_LABELS[metric.name] in page.text
            assert f"{interval.estimate:.3f}{interval.low:.3f} to {interval.high:.3f}" in page.text
            assert f"{metric.mean:.3f} ± {metric.sd:.3f}" in page.text


def test_page_opens_with_verdict_then_statements_then_metrics(page, result):
    order = [verdict_sentences(result)[0], *result.statements, "average precision"]
    body = page.text[page.text.index("out-of-fold study report") :]
    places = [body.index(text) for text in order]
    assert places == sorted(places)


def test_page_is_well_formed_and_accessible(page):
    assert page.faults == []
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(pictures) == len(FIGURES)
    assert all(len(alt) > 40 for alt in pictures)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    local = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert local <= set(page.ids)


def test_page_fetches_nothing_and_runs_nothing(html, page):
    assert not re.search(r"https?://|@import|<script|javascript:", html)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_figures_and_tables_carry_the_hash(folder, page, result):
    short = result.result_hash[:12]
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    for path in folder.rglob("*.*"):
        assert short in path.read_text(), path.name
    captions = sum(tag == "caption" for tag, _ in page.tags)
    assert page.text.count(f"Result {short}") == captions + 1
    assert short in render_console(result)


def test_figure_colours_follow_the_page_theme(html):
    inline = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", inline)) == set()
    themes = [block for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL) if "--ink" in block]
    assert len(themes) == 3, "light, dark, print"
    assert all(f"--{colour}:" in block for block in themes for colour in COLOURS)


def test_precision_recall_figure_has_the_prevalence_line(folder, html, result):
    drawn = [line for axis in draw_precision_recall(result).axes for line in axis.lines if line.get_gid()]
    assert [set(line.get_ydata()) for line in drawn] == [{64 / 160}] * 3
    svg = (folder / "figures" / "precision_recall.svg").read_text()
    for part in result.slice_counts:
        assert f'id="prevalence-{part.num_slices}"' in svg
        assert f'id="precision_recall-prevalence-{part.num_slices}"' in html


def test_same_result_gives_same_bytes(folder, result, tmp_path):
    write_report(make_result(), tmp_path, contact_sheet=PNG)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")} == first


def test_user_matplotlib_settings_change_nothing(result, folder, tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "none"}):
        write_report(result, tmp_path)
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / "figures/roc.svg").read_bytes() == (folder / "figures/roc.svg").read_bytes()


def test_names_from_outside_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&\x1b[31m"
    result = make_result(name=evil, statements=(evil,), config={evil: {evil: evil}}, groups={evil: 3})
    html = write_report(result, tmp_path).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert Page(html).faults == []
    assert "\x1b" not in render_console(result)
    assert "<script" not in (tmp_path / "tables/metrics.md").read_text()


def test_csv_keeps_full_precision(folder, result):
    rows = list(csv.DictReader(io.StringIO((folder / "tables/metrics.csv").read_text())))
    assert len(rows) == len(result.slice_counts) * 9
    for part in result.slice_counts:
        for metric in part.metrics:
            row = next(r for r in rows if (int(r["num_slices"]), r["metric"]) == (part.num_slices, metric.name))
            assert float(row["estimate"]) == metric.interval.estimate
            assert tuple(map(float, row["per_seed"].split(";"))) == metric.per_seed


@pytest.mark.parametrize("counts", [(3,), (1, 3, 5), (1, 3, 5, 7, 9)], ids=str)
def test_console_shows_all_within_its_width(counts):
    result = make_result(counts, (0.9,) * len(counts))
    text = render_console(result)
    assert max(map(len, text.splitlines())) <= 100
    for part in result.slice_counts:
        for metric in part.metrics:
            interval = metric.interval
            assert f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}] ±{metric.sd:.2f}" in text
    for wanted in ("Bayes-optimal", "0.96", "permutation p", "200 shuffles", "conditional on the trained models"):
        assert wanted in text


def test_console_without_seeds_bayes_or_permutations():
    bare = make_result((1,), num_seeds=1, bayes=None)
    text = render_console(with_part(bare, permutation=None))
    assert "Bayes" not in text
    assert "±0" not in text
    assert "No permutation test was run." in text


@pytest.mark.parametrize(
    ("bounds", "first"),
    [
        (((0.6, 0.8), (0.6, 0.8), (0.51, 0.7)), "Better than chance with 1, 3 and 5 slices."),
        (
            ((0.6, 0.8), (0.5, 0.7), (0.4, 0.6)),
            "Better than chance with 1 slice; not shown to be better than chance with 3 and 5 slices.",
        ),
        (((0.4, 0.6),) * 3, "Not shown to be better than chance with 1, 3 and 5 slices."),
    ],
    ids=["all above", "an end on 0.5 includes it", "none"],
)
def test_verdict_follows_the_intervals(result, bounds, first):
    assert verdict_sentences(with_auc(result, *bounds))[0] == first


def test_verdict_below_chance_names_the_likely_fault(result):
    assert "swapped labels" in verdict_sentences(with_auc(result, (0.2, 0.4)))[0]


def test_verdict_never_ranks_slice_counts_that_do_not_differ(result):
    text = " ".join(verdict_sentences(result))
    assert "1, 3 and 5 slices are not distinguishable here (smallest p\u00a0=\u00a00.640, Holm over 3 pairs)" in text
    assert "does not make them equal" in text
    assert comparison(result, "roc_auc") == "not distinguishable here"
    assert not re.search(r"\b(best with|worst|highest|lowest|outperform|superior)", text)


def test_verdict_names_pairs_that_differ_on_the_same_studies():
    result = make_result(comparisons=make_comparisons((1, 3, 5), k1_k5=0.012))
    text = " ".join(verdict_sentences(result))
    assert "5 slices lie 0.10 above 1 slice (95\u202f% interval 0.02 to 0.18, p\u00a0=\u00a00.012)" in text
    assert "Holm over 3 pairs; the other pairs are not distinguishable here." in text
    assert comparison(result, "roc_auc") == "differ: 1 | 5 (p\u00a0=\u00a00.012)"


def test_other_metrics_are_told_apart_by_their_intervals_only(result):
    apart = with_metric(result, "recall", 0, interval=Interval(estimate=0.1, low=0, high=0.2, level=0.95, method=""))
    assert comparison(apart, "recall").startswith("intervals apart: 1 | ")


def test_verdict_counts_pairs_when_there_are_many():
    counts = (1, 3, 5, 7)
    given = {"k1_k3": 0.01, "k1_k5": 0.01, "k1_k7": 0.01, "k3_k7": 0.02}
    many = make_result(counts, (0.9,) * 4, comparisons=make_comparisons(counts, **given))
    text = " ".join(verdict_sentences(with_auc(many, (0.4, 0.5), (0.55, 0.7), (0.6, 0.7), (0.6, 0.8))))
    assert "4 of 6 pairs of slice counts differ; the other pairs are not distinguishable here." in text
    assert "that of 1 slice includes 0.5" in text


def test_verdict_measures_distance_to_the_ceiling(result):
    bounds = ((0.7, 0.8), (0.6, 0.8), (0.6, 0.7))
    assert "The estimates stay 0.21 to 0.31 below it." in verdict_sentences(with_auc(result, *bounds))
    over = result.model_copy(update={"bayes": BayesReference(realised_auc=0.6, num_studies=160)})
    assert "luck or leakage" in " ".join(verdict_sentences(over))


def test_verdict_reads_the_permutations(result):
    null = result.slice_counts[2].permutation
    weak = with_part(result, 2, permutation=null.model_copy(update={"p_value": 0.21, "mean": 0.56}))
    text = " ".join(verdict_sentences(weak)).replace("\u00a0", " ")
    assert "stands out with 1 slice (p = 0.005) and 3 slices (p = 0.005)" in text
    assert "does not stand out with 5 slices (p = 0.210)" in text
    assert "With 5 slices the shuffled labels do not average 0.50" in text


def test_page_counts_crop_sources_and_says_that_they_do_not_know_the_label(page):
    text = page.text.replace("\u00a0", " ")
    assert "not distinguishable between symptomatic and asymptomatic studies (p = 0.970, 4999 shuffles" in text
    rows = {
        "placed or corrected by hand": (2, 1),
        "final segmenter": (38, 25),
        "segmenter, out of fold": (56, 38),
        "no crop: roi_several_components": (1, 1),
    }
    for name, (negative, positive) in rows.items():
        assert f"{name}{negative}{positive}" in text
    assert "Dice of 0.951 (standard error ± 0.002 over 110 images and ± 0.004 over 5 folds)" in text
    assert "a fixed mean box reaches 0.712. Its centroids are off by 1.4 mm (median) and 3.9 mm" in text


def test_sources_that_know_the_label_are_in_the_verdict(result):
    assert "crops" not in " ".join(verdict_sentences(result))
    biased = result.model_copy(update={"crops": make_provenance(p_value=0.0002)})
    text = " ".join(verdict_sentences(biased)).replace("\u00a0", " ")
    assert "Warning: the sources of the crops (placed or corrected by hand, final segmenter and segmenter, out" in text
    assert "differ between symptomatic and asymptomatic studies (p < 0.001" in text
    assert "Warning" in render_console(biased)


def test_crops_of_one_source_and_results_without_any(result, tmp_path):
    sources = make_provenance().sources[:1]
    one = make_provenance(sources=sources, statistic=None, p_value=None, segmenter=None, excluded=())
    page = Page(write_report(result.model_copy(update={"crops": one}), tmp_path / "one").read_text())
    assert "All crops have one source, placed or corrected by hand: it cannot tell the classes apart." in page.text
    page = Page(write_report(result.model_copy(update={"crops": None}), tmp_path / "none").read_text())
    assert page.faults == []
    assert "crops" not in page.ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.model_copy(update={"slice_counts": ()}), "at least one slice count is required"),
        (lambda r: with_metric(r, "mcc", mean=float("nan")), r"slice_counts\[0\]\.metrics\[7\]\.mean: a finite number"),
        (lambda r: with_part(r, 1, scores_positive=(float("inf"),)), r"slice_counts\[1\]\.scores_positive\[0\]"),
        (lambda r: with_part(r, metrics=r.slice_counts[0].metrics[1:]), "metric 'average_precision' is missing"),
        (lambda r: with_part(r, num_slices=3), "3 slices appear 2 times"),
        (lambda r: r.model_copy(update={"comparisons": r.comparisons[1:]}), "every pair of slice counts is required"),
        (lambda r: with_part(r, scores_negative=()), "scores_negative is empty"),
        (
            lambda r: with_part(r, confusion=Confusion(tp=1, fp=1, fn=1, tn=1)),
            "holds 64 studies, the confusion matrix 2",
        ),
        (lambda r: with_part(r, roc=r.slice_counts[0].roc.model_copy(update={"x": (0.0,)})), "roc needs two or more"),
    ],
    ids=["no slice count", "NaN", "infinite", "metric", "twice", "pair", "one class", "confusion", "curve"],
)
def test_unreportable_results_are_refused(result, tmp_path, change, message):
    broken = change(result)
    with pytest.raises(ValueError, match=message) as error:
        write_report(broken, tmp_path)
    assert "run the aggregation again" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=message):
        render_console(broken)


def test_contact_sheet_must_be_png(result, tmp_path):
    with pytest.raises(ValueError, match="bytes of a PNG"):
        write_report(result, tmp_path, contact_sheet=b"GIF89a")


@pytest.mark.parametrize("counts", [(1,), (1, 3, 5, 7)], ids=str)
def test_unusual_results_render_whole(counts, tmp_path):
    result = make_result(counts, (0.9,) * len(counts), num_seeds=1, bayes=None, funnel=(), groups={}, acquisition={})
    tested = with_part(result, permutation=None, fold_auc=())
    page = Page(write_report(tested, tmp_path).read_text())
    assert page.faults == []
    assert not (tmp_path / "figures/folds.svg").exists()
    assert (tmp_path / "figures/permutation.svg").exists() == (len(counts) > 1)
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_command_renders_a_saved_result_again(result, folder, tmp_path, capsys):
    result.save(tmp_path / "result.json")
    (tmp_path / "sheet.png").write_bytes(PNG)
    out = tmp_path / "again"
    sheet = ["--contact-sheet", str(tmp_path / "sheet.png")]
    assert main([str(tmp_path / "result.json"), "--out", str(out), *sheet]) == 0
    assert (out / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    printed = capsys.readouterr().out
    assert render_console(result) in printed
    assert printed.endswith(f"report: {out / 'report.html'}\n")


def test_command_explains_what_it_cannot_read(tmp_path, capsys):
    assert main([str(tmp_path / "absent.json"), "--out", str(tmp_path)]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_factory_scores_agree_with_its_auc(result):
    part = result.slice_counts[0]
    positive, negative = np.asarray(part.scores_positive), np.asarray(part.scores_negative)
    wins = (positive[:, None] > negative).mean()
    assert next(metric for metric in part.metrics if metric.name == METRIC_NAMES[1]).interval.estimate == pytest.approx(
        wins
    )
