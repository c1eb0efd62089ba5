import numpy as np
import pytest

from reca_trainer.evaluation.report import compare_measures, compare_rows, summarize, summarize_measures, write_report


def rows(scores, images=1, tag="a", prefix=""):
    """One prompt per score, with `images` equal images each."""
    return [
        {"id": f"{prefix}{i}", "filename": f"{i}/{k}.png", "score": float(s), "categories": {tag: [float(s), 1]}}
        for i, s in enumerate(scores)
        for k in range(images)
    ]


def test_independent_answers_get_wilsons_interval():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
    result = summarize(rows([1] * 81 + [0] * 182), "mean of images")["overall"]
    assert [round(result[name], 4) for name in ("score", "low", "high")] == [0.308, 0.2553, 0.3662]


def test_more_images_of_a_prompt_that_agree_say_nothing_new():
    once, four = (summarize(rows([1, 0, 1, 1, 0], images), "mean of images")["overall"] for images in (1, 4))
    assert once == pytest.approx(four)


def test_images_that_differ_within_prompts_count_more_than_prompts():
    same = summarize(rows([1, 0] * 10, images=2), "mean of images")["overall"]
    mixed = [{**row, "score": float(number % 2)} for number, row in enumerate(rows([0] * 20, images=2))]
    mixed[0]["score"] = 1.0  # not all prompts alike
    mixed = summarize(mixed, "mean of images")["overall"]
    assert mixed["high"] - mixed["low"] < same["high"] - same["low"]


@pytest.mark.parametrize("score", [0, 1])
def test_unanimous_images_still_leave_doubt(score):
    result = summarize(rows([score] * 10, images=4), "mean of images")["overall"]
    assert result["score"] == score and 0 <= result["low"] < result["high"] <= 1
    assert result["high"] - result["low"] == pytest.approx(0.2775, abs=1e-3)  # Wilson's for 10 of 10


def test_the_mean_of_categories_weighs_them_alike():
    both = rows([1] * 90, tag="easy", prefix="e") + rows([0] * 10, tag="hard", prefix="h")
    assert summarize(both, "mean of categories")["overall"]["score"] == pytest.approx(0.5)
    assert summarize(both, "mean of images")["overall"]["score"] == pytest.approx(0.9)
    parts = summarize(both, "mean of categories")["categories"]
    assert list(parts) == ["easy", "hard"] and parts["easy"]["score"] == 1


def test_the_mean_of_alike_categories_is_surer_than_each():
    four = [row for n in range(4) for row in rows([1, 0] * 50, tag=str(n), prefix=str(n))]
    result = summarize(four, "mean of categories")
    halved = (result["categories"]["0"]["high"] - 0.5) / 2
    assert result["overall"]["high"] - 0.5 == pytest.approx(halved)


def test_nothing_to_summarize_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        summarize([], "mean of images")


def test_a_model_does_not_differ_from_itself_as_far_as_its_prompts_tell():
    answers = rows([1, 0, 1, 0])
    result = compare_rows(answers, answers, "mean of images")["overall"]
    assert result["difference"] == 0 and result["high"] == -result["low"] == pytest.approx(1.96 / 6, abs=1e-3)


def test_answers_get_agresti_and_mins_interval():
    won, lost, prompts = 7, 3, 40
    base, other = [0] * won + [1] * (prompts - won), [1] * won + [0] * lost + [1] * (prompts - won - lost)
    result = compare_rows(rows(base, images=4), rows(other, images=4), "mean of images")["overall"]
    b, c, n = won + 0.5, lost + 0.5, prompts + 2
    half = 1.96 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    expected = [0.1, (b - c) / n - half, (b - c) / n + half]
    assert [result[name] for name in ("difference", "low", "high")] == pytest.approx(expected, abs=1e-4)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    base = rng.integers(2, size=200)
    better = np.where(np.arange(200) < 20, 1, base)  # wins on a few prompts, loses on none
    result = compare_rows(rows(base), rows(better), "mean of images")
    gain = (better - base).mean()
    assert result["overall"]["difference"] == pytest.approx(gain)
    assert 0 < result["overall"]["low"] < gain < result["overall"]["high"] < 0.1  # unpaired: about ± 0.1
    assert compare_rows(rows(better), rows(base), "mean of images")["overall"]["difference"] == pytest.approx(-gain)


def test_the_interval_of_a_difference_covers_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        base, other = rng.random((2, 60)) < np.array([[0.4], [0.6]])
        result = compare_rows(rows(base), rows(other), "mean of images")["overall"]
        covered += result["low"] <= 0.2 <= result["high"]
    assert 180 <= covered <= 199


def test_runs_over_other_images_are_not_compared():
    with pytest.raises(ValueError, match="same images"):
        compare_rows(rows([1, 0]), rows([1, 0, 1]), "mean of images")


def measured(values):
    """Rows of prompts a, b, … with two images each."""
    return [
        {"id": prompt, "filename": f"{k}.png", "score": 1.0, "categories": {}, "measures": {"b": value}}
        for prompt, pair in zip("abc", values, strict=True)
        for k, value in enumerate(pair)
    ]


def test_prompts_and_not_images_are_what_a_mean_is_sure_of():
    mean = summarize_measures(measured([(1, 3), (2, 2), (5, 5)]))["b"]
    assert mean["mean"] == 3 and mean["margin"] == pytest.approx(1.959964 * 3**0.5 / 3**0.5)
    assert summarize_measures([{"id": "a"}]) == {}


def test_a_measure_that_a_row_lacks_is_left_out():
    rows = measured([(1, 3), (2, 2), (5, 5)])
    rows[3]["measures"] = {}
    assert summarize_measures(rows) == {} == compare_measures(rows, rows)


def test_differences_of_measures_are_paired():
    base, other = measured([(1, 3), (20, 20), (50, 50)]), measured([(2, 4), (21, 21), (51, 51)])
    assert compare_measures(base, other) == {"b": {"mean": 1, "margin": 0}}
    assert compare_measures(other, base) == {"b": {"mean": -1, "margin": 0}}


def test_a_report_has_a_table_of_shares_and_one_of_means(tmp_path):
    answers = rows([1, 0, 1, 0])
    report = {"title": "T", "notes": ["N."], "overall_is": "mean of images", **summarize(answers, "mean of images")}
    text = write_report(tmp_path, {**report, "means": {"lab_b": {"mean": 3.14159, "margin": 0.5}}})
    assert "| overall | 50.0 |" in text and "| lab_b | 3.142 | 2.642 to 3.642 |" in text and text.endswith("\nN.\n")
    assert "| mean |" not in write_report(tmp_path, {**report, "means": {}})
