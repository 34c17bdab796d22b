# Generates <id>.json in this folder: denominator degrees of freedom by lmerTest and pbkrtest (Rscript ddf.R [regex of ids]).
suppressPackageStartupMessages({ library(lmerTest); library(jsonlite) })
args <- commandArgs(TRUE); PAT <- if (length(args)) args[1] else "."
software <- c(list(R = paste(R.version$major, R.version$minor, sep = ".")),
              lapply(c(lme4 = "lme4", lmerTest = "lmerTest", pbkrtest = "pbkrtest", numDeriv = "numDeriv"),
                     function(k) as.character(packageVersion(k))))
tab <- function(x) list(rows = I(rownames(x)), columns = I(colnames(x)), values = unname(as.matrix(as.data.frame(x))))
columns <- function(df) lapply(df, function(v) if (is.factor(v)) list(levels = I(levels(v)), values = I(as.character(v)),
                                                                       ordered = is.ordered(v)) else list(values = I(v)))
quiet <- function(e) suppressMessages(suppressWarnings(e))

# data: its name among the bundled data sets, or NULL for a made-up one, which is then stored.
# kr_model: pbkrtest 0.5.2 takes every weight as 1, so that a weighted model needs an unweighted equivalent.
run <- function(id, formula, df, data = NULL, REML = TRUE, weights = NULL, contrasts = NULL, kr = REML, tables = TRUE,
                kr_model = NULL, notes = "") {
  if (!grepl(PAT, id)) return(invisible(NULL))
  env <- new.env(parent = globalenv()); env$df <- df; env$contrasts <- contrasts
  call <- list(quote(lmer), formula = as.formula(formula, env = env), data = quote(df), REML = REML, contrasts = quote(contrasts))
  if (!is.null(weights)) call$weights <- as.name(weights)
  fit <- function(call) {
    control <- function(...) lmerControl(calc.derivs = FALSE, check.conv.singular = "ignore", ...)
    call$control <- control(optimizer = "bobyqa", optCtrl = list(rhoend = 1e-10, maxfun = 1e5))
    m <- quiet(eval(as.call(call), env))
    call$start <- getME(m, "theta")   # a second search from the first optimum, on a small scale
    call$control <- control(optimizer = "bobyqa", optCtrl = list(rhobeg = 1e-5, rhoend = 1e-12, maxfun = 1e5))
    quiet(eval(as.call(call), env))
  }
  m <- fit(call)
  out <- list(id = id, software = software, formula = formula, data = data, REML = REML, weights = weights,
              contrasts = contrasts, notes = notes, theta = I(unname(getME(m, "theta"))), sigma = sigma(m),
              criterion = -2 * as.numeric(logLik(m)),
              summary = list(satterthwaite = tab(coef(summary(m)))))
  if (kr) {
    k <- m
    if (!is.null(kr_model)) { call$formula <- as.formula(kr_model, env = env); call$weights <- NULL; k <- fit(call) }
    out$summary$kenward_roger <- tab(coef(summary(k, ddf = "Kenward-Roger")))
    out$summary$kenward_roger$rows <- I(names(fixef(m)))
    out$vcov_adjusted <- unname(as.matrix(pbkrtest::vcovAdj(k)))
    L <- diag(length(fixef(k)))[-1, , drop = FALSE]
    if (nrow(L)) out$slopes_kenward_roger <- tab(contest(k, L, joint = TRUE, ddf = "Kenward-Roger"))
  }
  if (tables && length(fixef(m)) > 1) {
    one <- function(type, ddf) { a <- quiet(anova(m, type = type, ddf = ddf)); c(tab(a), list(heading = attr(a, "heading"))) }
    for (type in c("1", "2", "3")) {
      out$anova[[type]] <- list(satterthwaite = one(type, "Satterthwaite"))
      if (kr && is.null(kr_model)) out$anova[[type]]$kenward_roger <- one(type, "Kenward-Roger")
    }
  }
  if (is.null(data)) out$frame <- columns(df)
  write_json(out, paste0(id, ".json"), auto_unbox = TRUE, digits = NA, na = "null", null = "null", pretty = FALSE)
  cat(id, "theta", format(getME(m, "theta")), "\n")
}

data(sleepstudy, Penicillin, Pastes, cake, package = "lme4"); data(Oxboys, package = "mlmRev")
run("sleep_reml", "Reaction ~ Days + (Days | Subject)", sleepstudy, "sleepstudy")
run("sleep_ml", "Reaction ~ Days + (Days | Subject)", sleepstudy, "sleepstudy", REML = FALSE)
run("sleep_double_bar", "Reaction ~ Days + (Days || Subject)", sleepstudy, "sleepstudy")
run("sleep_factor", "Reaction ~ factor(Days) + (Days | Subject)", sleepstudy, "sleepstudy")
run("cake", "angle ~ recipe * temperature + (1 | recipe:replicate)", cake, "cake")
run("penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)", Penicillin, "Penicillin")
run("pastes", "strength ~ 1 + (1 | batch/cask)", Pastes, "Pastes")
run("oxboys", "height ~ age + I(age^2) + (age | Subject)", as.data.frame(Oxboys), "Oxboys")

set.seed(71)
g <- rep(1:14, times = sample(3:9, 14, TRUE)); n <- length(g)
d <- data.frame(g = factor(g), a = factor(sample(c("p", "q", "r"), n, TRUE, c(.5, .3, .2))),
                b = factor(c("u", "v")[1 + g %% 2]), x = round(rnorm(n, 2, 1), 3))
d$y <- round(with(d, 3 + 0.8 * (a == "q") - 0.5 * (b == "v") + 0.7 * x + 0.4 * (a == "r") * x + rnorm(14)[g] +
                     0.4 * rnorm(14)[g] * x + rnorm(n, 0, .8)), 3)
run("unbalanced", "y ~ a * b + a * x + (1 | g)", d)
run("unbalanced_sum", "y ~ a * b + a * x + (1 | g)", d, contrasts = list(a = "contr.sum", b = "contr.helmert"))
run("unbalanced_slope", "y ~ a * b * x + (1 + x | g)", d)
run("unbalanced_ml", "y ~ a * b + x + (1 | g)", d, REML = FALSE)
run("no_intercept", "y ~ 0 + a * b + x + (1 | g)", d)
run("polynomial", "y ~ a * poly(x, 2) + (1 | g)", d)
d$z <- round(runif(nrow(d)), 3)
run("numeric_products", "y ~ x * z + x * a + b + (1 | g)", d)
run("missing_cell", "y ~ a * b + x + (1 | g)", d[!(d$a == "r" & d$b == "v"), ])

set.seed(72)
n <- 90
d <- data.frame(g = factor(sample(1:11, n, TRUE)), h = factor(sample(1:6, n, TRUE)), f = factor(sample(c("k", "l", "m"), n, TRUE)),
                x = round(runif(n), 3), w = round(rgamma(n, 3, 3) + .2, 3))
d$y <- round(with(d, 1 + x + .5 * (f == "l") + rnorm(11)[g] + .7 * rnorm(6)[h] + rnorm(n) / sqrt(w)), 3)
d$s <- sqrt(d$w); d$sy <- d$s * d$y; d$sx <- d$s * d$x; d$sl <- d$s * (d$f == "l"); d$sm <- d$s * (d$f == "m")
run("crossed_weights", "y ~ x + f + (1 | g) + (1 | h)", d, weights = "w",
    kr_model = "sy ~ 0 + s + sx + sl + sm + (0 + s | g) + (0 + s | h)",
    notes = "Kenward-Roger from the equivalent model whose rows are multiplied by sqrt(w)")

set.seed(73)
d <- data.frame(g = factor(rep(1:8, each = 5)), x = round(rnorm(40), 3))
d$y <- round(2 + .3 * d$x + rnorm(40), 3); d$y <- round(d$y - ave(d$y, d$g) * .8, 3)
run("singular", "y ~ x + (1 | g)", d)
set.seed(101)
d$y <- round(1 + .5 * d$x + rnorm(8)[d$g] * (1 + .3 * d$x) + rnorm(40, 0, .7), 3)
run("singular_correlation", "y ~ x + (x | g)", d)

set.seed(75)
d <- data.frame(g = factor(rep(1:5, times = c(3, 5, 4, 6, 2))))
d$trt <- factor(c("a", "a", "b", "c", "c")[d$g])
d$y <- round(rnorm(20) + 1.5 * rnorm(5)[d$g] + (d$trt == "b"), 3)
run("few_groups", "y ~ trt + (1 | g)", d, notes = "Fai & Cornelius with degrees of freedom of 2 and less")
