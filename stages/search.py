"""Search for a study's smallest or fastest variant that loses no more than its goal allows; make it ready to ship."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import UserError, run_stage
from quantstudy.files import write_json
from quantstudy.machine.device import set_up
from quantstudy.params import load_params
from quantstudy.search.search import search
from quantstudy.search.ship import metrics, records, ship
from quantstudy.search.workshop import opened
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/ship/ and reports/<study>/{ship,search}.json."""
    name = flags(argv, __doc__).study
    params = load_params()
    study = params.study(name)
    if study.goal is None:
        raise UserError(f"studies.{name}.goal: missing; write one, goal: {{max_drop: 1.0}} for example")
    device = set_up(study.seed, params.measure.threads)

    shop = opened(params, name, study, study.goal, device)
    test = load_split(layout.split(name, "test"))
    found = search(shop)
    if found.busy and not found.best:
        what = f"{', '.join(found.busy[:5])} could not be timed, as the machine was busy with other work"
        raise UserError(f"studies.{name}.goal: {what}; run the search again, and it goes on from here")
    facts = ship(shop, found, test, layout.ship(name))
    figures = metrics(facts)
    write_json(layout.ship_metrics(name), figures)
    said = {key: facts[key] for key in ("sentence", "variant", "goal", "ended")}
    write_json(layout.search(name), said | {"figures": figures, "trials": records(found)})
    shop.close()
    print(f"{facts['sentence']}; {layout.ship(name)}/")


if __name__ == "__main__":
    run_stage(main)
