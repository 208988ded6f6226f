"""Reports: several examples on one page, listed at its side, and any two of them compared.

    attnprobe.Reports([before, after], compare=(0, 1)).save("training.html")

Two answers of a model, an answer of two models, or a policy before and after training. The page opens each
entry when it is chosen, and compares in the browser. What is left to others: a single report (document), and
the page (page).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from attnprobe.errors import ParameterError
from attnprobe.report.document import Report, check_dependencies
from attnprobe.report.page import Page, page_html
from attnprobe.validation import IntLike, brief, instance, whole_number

if TYPE_CHECKING:
    ReportsLike: TypeAlias = Iterable[Report]
    PairLike: TypeAlias = tuple[IntLike, IntLike]
else:
    ReportsLike = PairLike = Any


class Reports(Page):
    """Several reports on one page.

    Args:
        reports: the reports, in the order in which the page lists them.
        title: the page's heading; each report keeps its own title in the list.
        compare: the numbers of two reports, A and B, to open the page with their comparison: the second
            against the first. None opens the first report; any two can be compared on the page.

    Raises:
        ParameterError: no reports, something that is no report, or a comparison with a report that is not
            there or with itself.
    """

    def __init__(
        self,
        reports: ReportsLike,
        *,
        title: str = "Attention reports",
        compare: PairLike | None = None,
    ) -> None:
        if isinstance(reports, Report) or not isinstance(reports, Iterable):
            raise ParameterError(f"reports must be a list of Report; got {brief(reports)}")
        self._reports: tuple[Report, ...] = tuple(
            instance(each, Report, "each of the reports", "Report(...) makes one") for each in reports
        )
        if not self._reports:
            raise ParameterError("there are no reports to show")
        self.title: str = instance(title, str, "title")
        self.compare: tuple[int, int] | None = None if compare is None else self._pair(compare)

    def _pair(self, compare: Any) -> tuple[int, int]:
        if not isinstance(compare, tuple | list) or len(compare) != 2:
            raise ParameterError(
                f"compare must be the numbers of two reports, such as (0, 1); got {brief(compare)}"
            )
        most = len(self._reports) - 1
        first, second = (whole_number(each, "compare", maximum=most) for each in compare)
        if first == second:
            raise ParameterError(f"compare must be two different reports; got {first} twice")
        return first, second

    def __len__(self) -> int:
        return len(self._reports)

    def __getitem__(self, number: IntLike) -> Report:
        """Return a report by its number.

        Raises:
            ParameterError: a number that no report has.
        """
        count = len(self._reports)
        return self._reports[whole_number(number, "number", minimum=-count, maximum=count - 1)]

    def __iter__(self) -> Iterator[Report]:
        return iter(self._reports)

    def __repr__(self) -> str:
        return f"Reports({len(self)} reports: {', '.join(repr(each.title) for each in self._reports)})"

    def html(self) -> str:
        """Return the page.

        Raises:
            MissingDependencyError: jinja2 is not installed.
        """
        check_dependencies()
        return page_html(
            self.title, [each.entry() for each in self._reports], self.compare, is_collection=True
        )
