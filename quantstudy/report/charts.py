"""The charts of the HTML report, as Vega-Lite specifications without data.

Each chart names the data sets that it draws. The page's script fills them, already filtered, so the table, the sliders
and the charts always show the same rows. Colour alone never carries a meaning: each family of variants also has its own
shape, and a simulated kernel is hollow. The page has the same numbers as tables, so the drawings are hidden from screen
readers.
"""

from typing import Any

import altair as alt

from quantstudy.report.style import FAMILIES

SHAPES = {
    "fp32": "M0,-1L0.29,-0.4L0.95,-0.31L0.48,0.15L0.59,0.81L0,0.5L-0.59,0.81L-0.48,0.15L-0.95,-0.31L-0.29,-0.4Z",
    "16-bit float": "M-0.7,0A0.7,0.7,0,1,0,0.7,0A0.7,0.7,0,1,0,-0.7,0Z",
    "INT8": "M-0.65,-0.65H0.65V0.65H-0.65Z",
    "INT8 clipped": "M-0.28,-0.8H0.28V-0.28H0.8V0.28H0.28V0.8H-0.28V0.28H-0.8V-0.28H-0.28Z",
    "uniform INT4": "M0,-0.9L0.75,0L0,0.9L-0.75,0Z",
    "INT4 clipped": "M-.8,-.5L-.5,-.8L0,-.3L.5,-.8L.8,-.5L.3,0L.8,.5L.5,.8L0,.3L-.5,.8L-.8,.5L-.3,0Z",
    "mixed": "M0,-0.8L0.8,0.65H-0.8Z",
    "other": "M0,0.8L0.8,-0.65H-0.8Z",
}
"""The outline of each family's mark, SVG paths in a square from -1 to 1."""
assert SHAPES.keys() == FAMILIES.keys()

ACCURACY = "top-1 accuracy, %"
FAMILY = alt.Scale(domain=list(FAMILIES))
LAYER = alt.X(
    "index:O", axis=alt.Axis(title="layer, from the input to the output", labelOverlap=True, labelAngle=0, ticks=False)
)
ON_TOP = alt.Legend(orient="top", symbolOpacity=1, symbolType="square")
FADED_UNLESS_CHOSEN = alt.condition("datum.chosen", alt.value(1), alt.value(0.55))


def specifications() -> dict[str, dict[str, Any]]:
    """Return every chart, by the name of its place on the page."""
    costs = {"size": "size of the model file, MB", "latency": "latency, ms a batch"}
    costs["operations"] = "bit-operations an image, 10⁹"
    charts = {"scaling": scaling_law()} | {name: trade_off(cost) for name, cost in costs.items()}
    charts |= {"shares": layer_shares(), "sqnr": layer_sqnr(), "sensitivity": sensitivity()}
    charts |= {"histogram": histogram(), "classes": classes()}
    specifications = {name: chart.properties(width="container").to_dict() for name, chart in charts.items()}
    for specification in specifications.values():
        del specification["config"]  # the page's theme sets it
    return specifications


def _chart(rows: str, height: int) -> alt.Chart:
    return alt.Chart(alt.NamedData(rows), height=height)


def _tips(*columns: str) -> list[alt.Tooltip]:
    """Return the lines of a tooltip, each written `field:type`, then `|format` and `|title` where it has them."""
    tips = []
    for column in columns:
        field, form, title = (*column.split("|"), "", "")[:3]
        tips.append(alt.Tooltip(field, format=form or alt.Undefined, title=title or alt.Undefined))
    return tips


def _series(field: str, *names: str) -> alt.Color:
    """Return the colours of a column with few values, with a legend above the chart."""
    return alt.Color(f"{field}:N", title=None, scale=alt.Scale(domain=names, range="ordinal"), legend=ON_TOP)


def trade_off(cost: str) -> Any:
    """Return top-1 against a cost. The rows of `variants` also have `cost`, its ends and `on_front`."""
    base = _chart("variants", 340)
    scale = alt.Scale(type="log", nice=False, padding=24)
    x = alt.X("cost:Q", title=cost, scale=scale, axis=alt.Axis(tickCount=6, grid=False))
    y = alt.Y("top1:Q", title=ACCURACY, scale=alt.Scale(zero=False, padding=12))
    low, high = alt.Y("top1_low:Q", title=ACCURACY), alt.Y2("top1_high:Q")
    band = base.transform_filter("datum.variant == 'fp32'").mark_rect(opacity=0.1).encode(y=low, y2=high)
    front = base.transform_filter("datum.on_front").mark_line(
        interpolate="step-after", strokeDash=[5, 4], strokeWidth=1.2, opacity=0.8, color="#8A8A8A"
    )
    color = alt.Color("family:N", scale=FAMILY, legend=None)
    spread = base.mark_rule(opacity=0.4).encode(x=x, y=low, y2=high, color=color)
    sideways = base.mark_rule(opacity=0.4).encode(x=alt.X("cost_low:Q", title=cost), x2="cost_high:Q", y=y, color=color)
    marks = base.mark_point(cursor="pointer", strokeWidth=1.6).encode(
        stroke=alt.Stroke("family:N", scale=FAMILY, legend=None),
        fill=alt.Fill("family:N", scale=FAMILY, legend=None),
        shape=alt.Shape("family:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())), legend=None),
        fillOpacity=alt.condition("datum.hollow", alt.value(0), alt.value(0.9)),
        size=alt.condition("datum.chosen", alt.value(340), alt.value(120)),
        tooltip=_tips(
            *("variant:N", "top1:Q|.2f|top-1 %", "top1_ci95:Q|.2f|±", "cost:Q|.4~r|cost", "size_mb:Q|.2f|size, MB"),
            *("widths:N||W/A bits", "kernel_name:N||kernel"),
        ),
    )
    align, dx = alt.expr("datum.on_the_right ? 'right' : 'left'"), alt.expr("datum.on_the_right ? -13 : 13")
    names = base.transform_filter("datum.chosen || datum.recommended")
    names = names.mark_text(align=align, dx=dx, dy=-11, fontWeight="bold").encode(text="variant:N")
    front, marks, names = (layer.encode(x=x, y=y) for layer in (front, marks, names))
    return alt.layer(band, front, spread, sideways, marks, names)


def scaling_law() -> Any:
    """Return top-1 over bits without and with training, with the bands of the 95 % intervals; rows are `points`."""
    base = _chart("points", 340).encode(
        x=alt.X("bits:O", title="bits of a weight", sort="descending", axis=alt.Axis(labelAngle=0)),
        color=_series("training", "without training (PTQ)", "with training (QAT)"),
    )
    y = alt.Y("top1:Q", title=ACCURACY, scale=alt.Scale(zero=False))
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("top1_low:Q", title=ACCURACY), y2="top1_high:Q")
    points = base.mark_point(filled=True, size=70, opacity=1, cursor="pointer").encode(
        y=y,
        shape=alt.Shape("training:N", legend=None),
        size=alt.condition("datum.chosen", alt.value(260), alt.value(70)),
        tooltip=_tips("variant:N", "top1:Q|.2f", "top1_ci95:Q|.2f"),
    )
    return alt.layer(band, base.mark_line().encode(y=y), points)


def layer_shares() -> Any:
    """Return each layer's share of the model's bytes and multiply-accumulates; rows are `shares`."""
    marks = _chart("shares", 200).mark_bar(cursor="pointer")
    return marks.encode(
        x=LAYER,
        xOffset="of:N",
        y=alt.Y("share:Q", title="share", axis=alt.Axis(format="%")),
        color=_series("of", "bytes", "multiply-accumulates"),
        opacity=FADED_UNLESS_CHOSEN,
        tooltip=_tips("layer:N", "of:N", "share:Q|.2%"),
    )


def layer_sqnr() -> Any:
    """Return the SQNR of each layer's output, and its bits; rows are `layers`."""
    base = _chart("layers", 200).encode(
        x=LAYER, y=alt.Y("sqnr_db:Q", title="SQNR of its output, dB", scale=alt.Scale(zero=False))
    )
    points = base.mark_point(filled=True, size=70, cursor="pointer").encode(
        color=alt.Color("bits:N", title="W/A bits", scale=alt.Scale(range="ordinal"), legend=alt.Legend(orient="top")),
        shape=alt.Shape("bits:N", title="W/A bits"),
        opacity=FADED_UNLESS_CHOSEN,
        tooltip=_tips("layer:N", "bits:N", "sqnr_db:Q|.1f|SQNR, dB"),
    )
    return alt.layer(base.mark_line(color="#8A8A8A", strokeWidth=1), points)


def sensitivity() -> Any:
    """Return the drop of accuracy when one layer alone has fewer bits; rows are `sensitivity`."""
    scale, legend = alt.Scale(domainMin=0, clamp=True), alt.Legend(orient="top", gradientLength=160)
    marks = _chart("sensitivity", 150).mark_rect(cursor="pointer")
    return marks.encode(
        x=LAYER,
        y=alt.Y("bits:O", title="bits", sort="descending"),
        color=alt.Color("top1_drop:Q", title="points lost", scale=scale, legend=legend),
        tooltip=_tips("layer:N", "bits:O", "top1_drop:Q|.2f|points lost", "sqnr_db:Q|.1f|SQNR, dB"),
    )


def histogram() -> Any:
    """Return the histogram of a layer's input (rows `bins`) and where it may be clipped (rows `thresholds`)."""
    bars = _chart("bins", 240).mark_rect(opacity=0.75)
    bars = bars.encode(
        x=alt.X("low:Q", title="activation", scale=alt.Scale(nice=False, zero=False)),
        x2="high:Q",
        y=alt.Y("share:Q", title="share of the values", scale=alt.Scale(type="log"), axis=alt.Axis(format="~%")),
        y2="floor:Q",
        tooltip=_tips("low:Q|.3~r", "high:Q|.3~r", "share:Q"),
    )
    legend = alt.Legend(orient="top", columns=3)
    rules = alt.Chart(alt.NamedData("thresholds")).mark_rule(strokeWidth=2)
    rules = rules.encode(
        x=alt.X("value:Q", title="activation"),
        color=alt.Color("label:N", title="clipped at", sort=None, scale=alt.Scale(range="ordinal"), legend=legend),
        strokeDash=alt.StrokeDash("label:N", title="clipped at", sort=None),
        tooltip=_tips("label:N", "value:Q|.4~r"),
    )
    return alt.layer(bars, rules)


def classes() -> Any:
    """Return the images per class that the variant loses (negative) and gains over the baseline; rows are `classes`."""
    whole = alt.Axis(labelExpr="datum.value % 1 ? '' : abs(datum.value)", tickMinStep=1)
    marks = _chart("classes", 200).mark_bar()
    return marks.encode(
        y=alt.Y("name:N", title="class", sort=None, axis=alt.Axis(labelLimit=110)),
        x=alt.X("images:Q", title="images lost (left) and gained (right)", axis=whole),
        color=_series("change", "lost", "gained"),
        tooltip=_tips("name:N", "change:N", "images:Q"),
    )
