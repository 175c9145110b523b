"""What people look at: pictures, tables and pages of trainings.

    plot_curves     losses and micro-F1 of a run by epoch, as a picture
    write_report    one self-contained HTML file about one run or several
    explain         one sample as a model sees it; `write_explanation` makes a page of it

Every file of this package has one subject; `document` puts the parts of a report together.
"""

from mmer_fast.report.curves import plot_curves
from mmer_fast.report.document import write_explanation, write_report
from mmer_fast.report.explanation import Explanation, explain

__all__ = ["Explanation", "explain", "plot_curves", "write_explanation", "write_report"]
