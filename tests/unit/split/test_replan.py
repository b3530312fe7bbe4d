"""When a split is changed while it serves: for good reasons that last, and for no others."""

from mcp_vllm.split.replan import STEPS, WINDOWS, DecodeStep, Replanner

HELD = (1, 9)
QUICK_STAGE = DecodeStep(whole=0.1, layer=0.01, stage=0.004, link=0.001)
SLOW_LINK = DecodeStep(whole=0.2, layer=0.01, stage=0.004, link=0.12)
EVEN = DecodeStep(whole=0.1, layer=0.01, stage=0.04, link=0.002)


class Served:
    """A split that serves, step after step, with a clock of its own."""

    def __init__(self, span=(3, 7), fits=lambda span: True, may_be_local=True):
        self.replanner = Replanner(1.0, fits)
        self.span, self.may_be_local, self.now = span, may_be_local, 0.0

    def windows(self, step, count):
        """What is proposed within so many windows."""
        return self._run(
            lambda: self.replanner.observe(step, self.now, self.span, HELD, self.may_be_local),
            count,
        )

    def at_home(self, step, count):
        """The same while all layers are local."""
        return self._run(lambda: self.replanner.observe_at_home(step, self.now, (3, 7)), count)

    def _run(self, observe, count):
        proposed = None
        for _ in range(count * (STEPS + 1)):
            proposed = observe() or proposed
            self.now += 1.0 / STEPS
        return proposed


def test_a_quicker_stage_gets_all_that_it_holds_but_not_at_once():
    served = Served()
    assert served.windows(QUICK_STAGE, WINDOWS - 1) is None
    change = served.windows(QUICK_STAGE, 2)
    assert change.span == HELD
    assert abs(change.then_s - (0.1 - 4 * (0.01 - 0.001))) < 1e-9


def test_a_link_that_has_become_slow_brings_the_layers_home():
    assert Served().windows(SLOW_LINK, WINDOWS + 1).span is None


def test_what_may_not_come_home_stays():
    assert Served(span=HELD, may_be_local=False).windows(SLOW_LINK, 20) is None


def test_what_does_not_fit_is_not_proposed():
    served = Served((3, 5), fits=lambda span: span is not None and span[1] <= 7)
    change = served.windows(QUICK_STAGE, 10)
    assert change.span == (1, 7)


def test_a_gain_that_is_small_changes_nothing():
    assert Served().windows(EVEN, 50) is None


def test_a_busy_moment_changes_nothing():
    served = Served()
    for _ in range(20):
        assert served.windows(SLOW_LINK, WINDOWS - 1) is None
        assert served.windows(EVEN, 2) is None


def test_after_a_change_it_begins_anew():
    served = Served()
    assert served.windows(SLOW_LINK, WINDOWS - 1) is None
    served.replanner.forget()
    assert served.windows(SLOW_LINK, WINDOWS - 1) is None


HOME = DecodeStep(whole=0.1, layer=0.01, stage=0.0, link=0.001)


def test_layers_go_back_to_a_quicker_stage_once_its_link_is_quick_again():
    served = Served(may_be_local=False, span=HELD)
    served.windows(DecodeStep(whole=0.2, layer=0.01, stage=0.008, link=0.12), 2)
    served.replanner.forget()
    slow = DecodeStep(whole=0.1, layer=0.01, stage=0.0, link=0.12)
    assert served.at_home(slow, 10) is None
    assert served.at_home(HOME, WINDOWS - 1) is None
    assert served.at_home(HOME, WINDOWS + 1).span == (3, 7)


def test_nothing_goes_to_a_stage_of_which_nothing_is_known():
    assert Served().at_home(HOME, 20) is None
