"""How the tests check the package's annotations at run time.

By beartype, with int accepted where float is asked for.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
