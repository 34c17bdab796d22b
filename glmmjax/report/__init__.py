"""Tables and pictures: what a reader sees, and progress.

Others may use all of it: `table` (blocks of what is shown, and the formats that write them: a new output format is a
class there), `numbers` (as R writes them), `anova_table`; `panels`, `pyplot` and `profile_plots`; `progress`.
Nothing here knows of models, formulas or fits.
"""
