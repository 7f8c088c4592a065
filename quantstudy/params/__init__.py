"""The typed, validated view of `params.yaml`.

Every section is a frozen pydantic model that forbids unknown keys, so a misspelt key, a wrong type or a
number out of range is an error of one line that names the key, the value and the choices.
"""

from quantstudy.params.goal import *  # noqa: F403
from quantstudy.params.methods import *  # noqa: F403
from quantstudy.params.presets import *  # noqa: F403
from quantstudy.params.project import *  # noqa: F403
from quantstudy.params.section import *  # noqa: F403
from quantstudy.params.studies import *  # noqa: F403
