"""The charts of the HTML report, as Vega-Lite specifications without data.

Each names the data sets that the page's script hands it, already filtered, so that the table, the sliders and the
charts always show the same rows. Nothing is said by colour alone: a family of variants also has its own shape, and a
simulated kernel is hollow. The page has the same numbers as tables, so the drawings are hidden from screen readers.
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
LAYER_AXIS = alt.Axis(title="layer, from the input to the output", labelOverlap=True, labelAngle=0, ticks=False)


def specifications() -> dict[str, dict[str, Any]]:
    """Return every chart of the page by the name of its place there."""
    charts = {
        "scaling": scaling_law(),
        "size": trade_off("size of the model file, MB"),
        "latency": trade_off("latency, ms a batch"),
        "operations": trade_off("bit-operations an image, 10⁹"),
        "shares": layer_shares(),
        "sqnr": layer_sqnr(),
        "sensitivity": sensitivity(),
        "histogram": histogram(),
        "classes": classes(),
    }
    return {name: _plain(chart) for name, chart in charts.items()}


def _plain(chart: Any) -> dict[str, Any]:
    specification: dict[str, Any] = chart.properties(width="container").to_dict()
    del specification["config"]  # the page's theme sets it
    return specification


def trade_off(cost: str) -> Any:
    """Return top-1 against a cost. Rows of `variants` have `cost`, its ends and `on_front` beside their own columns."""
    base = alt.Chart(alt.NamedData("variants"), height=340)
    x = alt.X(
        "cost:Q",
        title=cost,
        scale=alt.Scale(type="log", nice=False, padding=24),
        axis=alt.Axis(tickCount=6, grid=False),
    )
    y = alt.Y("top1:Q", title=ACCURACY, scale=alt.Scale(zero=False, padding=12))
    low, high = alt.Y("top1_low:Q", title=ACCURACY), alt.Y2("top1_high:Q")
    band = base.transform_filter("datum.variant == 'fp32'").mark_rect(opacity=0.1).encode(y=low, y2=high)
    front = base.transform_filter("datum.on_front").mark_line(
        interpolate="step-after", strokeDash=[5, 4], strokeWidth=1.2, opacity=0.8, color="#8A8A8A"
    )
    color = alt.Color("family:N", scale=FAMILY, legend=None)
    spread = base.mark_rule(opacity=0.4).encode(x=x, y=low, y2=high, color=color)
    sideways = base.mark_rule(opacity=0.4).encode(x=alt.X("cost_low:Q", title=cost), x2="cost_high:Q", y=y, color=color)
    return alt.layer(band, front.encode(x=x, y=y), spread, sideways, _marks(base, x, y), _names(base, x, y))


def _marks(base: alt.Chart, x: alt.X, y: alt.Y) -> alt.Chart:
    return base.mark_point(cursor="pointer", strokeWidth=1.6).encode(
        x=x,
        y=y,
        stroke=alt.Stroke("family:N", scale=FAMILY, legend=None),
        fill=alt.Fill("family:N", scale=FAMILY, legend=None),
        shape=alt.Shape("family:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())), legend=None),
        fillOpacity=alt.condition("datum.hollow", alt.value(0), alt.value(0.9)),
        size=alt.condition("datum.chosen", alt.value(340), alt.value(120)),
        tooltip=[
            alt.Tooltip("variant:N"),
            alt.Tooltip("top1:Q", title="top-1 %", format=".2f"),
            alt.Tooltip("top1_ci95:Q", title="±", format=".2f"),
            alt.Tooltip("cost:Q", title="cost", format=".4~r"),
            alt.Tooltip("size_mb:Q", title="size, MB", format=".2f"),
            alt.Tooltip("widths:N", title="W/A bits"),
            alt.Tooltip("kernel_name:N", title="kernel"),
        ],
    )


def _names(base: alt.Chart, x: alt.X, y: alt.Y) -> alt.Chart:
    side = alt.expr("datum.on_the_right ? 'right' : 'left'")
    named = base.transform_filter("datum.chosen || datum.recommended")
    return named.mark_text(align=side, dx=alt.expr("datum.on_the_right ? -13 : 13"), dy=-11, fontWeight="bold").encode(
        x=x, y=y, text="variant:N"
    )


def scaling_law() -> Any:
    """Return top-1 over bits without and with training, with the bands of the 95 % intervals; rows are `points`."""
    base = alt.Chart(alt.NamedData("points"), height=340).encode(
        x=alt.X("bits:O", title="bits of a weight", sort="descending", axis=alt.Axis(labelAngle=0)),
        color=alt.Color(
            "training:N",
            title=None,
            scale=alt.Scale(domain=["without training (PTQ)", "with training (QAT)"], range="ordinal"),
            legend=alt.Legend(orient="top", symbolOpacity=1, symbolType="square"),
        ),
    )
    y = alt.Y("top1:Q", title=ACCURACY, scale=alt.Scale(zero=False))
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("top1_low:Q", title=ACCURACY), y2="top1_high:Q")
    tooltip = [alt.Tooltip("variant:N"), alt.Tooltip("top1:Q", format=".2f"), alt.Tooltip("top1_ci95:Q", format=".2f")]
    points = base.mark_point(filled=True, size=70, opacity=1, cursor="pointer").encode(
        y=y,
        shape=alt.Shape("training:N", legend=None),
        size=alt.condition("datum.chosen", alt.value(260), alt.value(70)),
        tooltip=tooltip,
    )
    return alt.layer(band, base.mark_line().encode(y=y), points)


def layer_shares() -> Any:
    """Return each layer's share of the model's bytes and multiply-accumulates; rows are `shares`."""
    return (
        alt.Chart(alt.NamedData("shares"), height=200)
        .mark_bar(cursor="pointer")
        .encode(
            x=alt.X("index:O", axis=LAYER_AXIS),
            xOffset="of:N",
            y=alt.Y("share:Q", title="share", axis=alt.Axis(format="%")),
            color=alt.Color(
                "of:N",
                title=None,
                scale=alt.Scale(domain=["bytes", "multiply-accumulates"], range="ordinal"),
                legend=alt.Legend(orient="top"),
            ),
            opacity=_unless_another_layer(),
            tooltip=["layer:N", "of:N", alt.Tooltip("share:Q", format=".2%")],
        )
    )


def layer_sqnr() -> Any:
    """Return the SQNR of each layer's output, and its bits; rows are `layers`."""
    base = alt.Chart(alt.NamedData("layers"), height=200).encode(
        x=alt.X("index:O", axis=LAYER_AXIS),
        y=alt.Y("sqnr_db:Q", title="SQNR of its output, dB", scale=alt.Scale(zero=False)),
    )
    bits = alt.Color("bits:N", title="W/A bits", scale=alt.Scale(range="ordinal"))
    points = base.mark_point(filled=True, size=70, cursor="pointer").encode(
        color=bits.legend(orient="top"),
        shape=alt.Shape("bits:N", title="W/A bits"),
        opacity=_unless_another_layer(),
        tooltip=["layer:N", "bits:N", alt.Tooltip("sqnr_db:Q", title="SQNR, dB", format=".1f")],
    )
    return alt.layer(base.mark_line(color="#8A8A8A", strokeWidth=1), points)


def _unless_another_layer() -> Any:
    return alt.condition("datum.chosen", alt.value(1), alt.value(0.55))


def sensitivity() -> Any:
    """Return the drop of accuracy when one layer alone has fewer bits; rows are `sensitivity`."""
    return (
        alt.Chart(alt.NamedData("sensitivity"), height=150)
        .mark_rect(cursor="pointer")
        .encode(
            x=alt.X("index:O", axis=LAYER_AXIS),
            y=alt.Y("bits:O", title="bits", sort="descending"),
            color=alt.Color(
                "top1_drop:Q",
                title="points lost",
                scale=alt.Scale(domainMin=0, clamp=True),
                legend=alt.Legend(orient="top", gradientLength=160),
            ),
            tooltip=[
                "layer:N",
                "bits:O",
                alt.Tooltip("top1_drop:Q", title="points lost", format=".2f"),
                alt.Tooltip("sqnr_db:Q", title="SQNR, dB", format=".1f"),
            ],
        )
    )


def histogram() -> Any:
    """Return the histogram of a layer's input (rows `bins`) and where it may be clipped (rows `thresholds`)."""
    bars = (
        alt.Chart(alt.NamedData("bins"), height=240)
        .mark_rect(opacity=0.75)
        .encode(
            x=alt.X("low:Q", title="activation", scale=alt.Scale(nice=False, zero=False)),
            x2="high:Q",
            y=alt.Y("share:Q", title="share of the values", scale=alt.Scale(type="log"), axis=alt.Axis(format="~%")),
            y2="floor:Q",
            tooltip=[alt.Tooltip("low:Q", format=".3~r"), alt.Tooltip("high:Q", format=".3~r"), "share:Q"],
        )
    )
    label = alt.Color("label:N", title="clipped at", sort=None, scale=alt.Scale(range="ordinal"))
    rules = (
        alt.Chart(alt.NamedData("thresholds"))
        .mark_rule(strokeWidth=2)
        .encode(
            x=alt.X("value:Q", title="activation"),
            color=label.legend(orient="top", columns=3),
            strokeDash=alt.StrokeDash("label:N", title="clipped at", sort=None),
            tooltip=["label:N", alt.Tooltip("value:Q", format=".4~r")],
        )
    )
    return alt.layer(bars, rules)


def classes() -> Any:
    """Return the images a class that the variant loses (negative) and gains against the baseline; rows `classes`."""
    whole = alt.Axis(labelExpr="datum.value % 1 ? '' : abs(datum.value)", tickMinStep=1)
    return (
        alt.Chart(alt.NamedData("classes"), height=200)
        .mark_bar()
        .encode(
            y=alt.Y("name:N", title="class", sort=None, axis=alt.Axis(labelLimit=110)),
            x=alt.X("images:Q", title="images lost (left) and gained (right)", axis=whole),
            color=alt.Color(
                "change:N",
                title=None,
                scale=alt.Scale(domain=["lost", "gained"], range="ordinal"),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["name:N", "change:N", "images:Q"],
        )
    )
