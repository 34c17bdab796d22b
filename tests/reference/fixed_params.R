# Objective values at fixed (non-optimal) parameters, without any optimizer: fixed_params/*.json
# For GLMMs the objective is -2 log of the Laplace (nAGQ = 1) or AGQ (nAGQ > 1) likelihood at c(theta, beta);
# lme4's deviance function is rebuilt for every point, so no state is carried over from one point to the next.
source("lib.R"); suppressPackageStartupMessages(library(mlmRev))
rd <- function(n) { j <- fromJSON(paste0("data/", n, ".json"), simplifyVector = FALSE); d <- read.csv(paste0("data/", j$file))
  for (k in j$columns) if (k$type %in% c("factor", "ordered")) d[[k$name]] <- factor(as.character(d[[k$name]]), levels = unlist(k$levels), ordered = k$type == "ordered"); d }
glmm_point <- function(data, formula, family, nAGQ, par, weights = NULL, offset = NULL, tol = 1e-15) {
  env <- new.env(); env$d <- data; fo <- as.formula(formula, env = env)
  cl <- list(quote(glmer), formula = fo, data = quote(d), family = parse(text = family)[[1]], nAGQ = nAGQ, devFunOnly = TRUE,
             control = glmerControl(tolPwrss = tol, check.conv.singular = "ignore"))
  if (!is.null(weights)) cl$weights <- parse(text = weights)[[1]]
  if (!is.null(offset)) cl$offset <- parse(text = offset)[[1]]
  df <- suppressWarnings(suppressMessages(eval(as.call(cl), env)))
  v1 <- df(par); e <- environment(df)
  out <- list(par = I(par), objective = v1, ldL2 = e$pp$ldL2(), u_sumsq = e$pp$sqrL(1), family_aic = e$resp$aic(),
              sum_deviance_residuals_sq = e$resp$resDev(), u_modes = I(as.numeric(e$pp$u(1))),
              linear_predictor_first20 = I(head(as.numeric(e$resp$eta), 20)))
  out$objective_second_call <- df(par)
  out
}
npar <- function(data, formula) { gf <- suppressMessages(glFormula(as.formula(formula), data, family = binomial, control = glmerControl(check.response.not.const = "ignore")))
  list(theta = gf$reTrms$theta, lower = gf$reTrms$lower, X = colnames(gf$X)) }
GP <- function(id, dataset, formula, family = "binomial()", nAGQ = 1L, betas, thetas, weights = NULL, offset = NULL, notes = "") {
  d <- rd(dataset); pts <- list(); X <- NULL; th <- NULL
  for (b in betas) for (t in thetas) { r <- try(glmm_point(d, formula, family, nAGQ, c(t, b), weights, offset), silent = TRUE)
    if (inherits(r, "try-error")) r <- glmm_point(d, formula, family, nAGQ, c(t, b), weights, offset, tol = 1e-13)
    pts[[length(pts) + 1]] <- r }
  env <- new.env(); env$d <- d
  m <- lFormula(update(as.formula(formula), . ~ .), cbind(d, .y = 0), control = lmerControl(check.nobs.vs.nRE = "ignore", check.nobs.vs.nlev = "ignore", check.nobs.vs.rankZ = "ignore"))
  wj(list(id = id, dataset = dataset, formula = formula, family_call = family, nAGQ = nAGQ, weights = weights, offset = offset,
          parameter_order = "par = c(theta, beta): theta in lme4 order, beta in the order of the fixed-effects columns",
          theta_names = I(names(m$reTrms$cnms)), n_theta = length(m$reTrms$theta), beta_names = I(colnames(m$X)),
          objective = if (nAGQ > 1) "lme4's AGQ deviance: no normalizing constants of the response density (see README)" else "-2 log Laplace likelihood = family_aic + ldL2 + u_sumsq",
          u_order = "u_modes: spherical conditional modes, in the order of lme4's Zt rows (terms ordered by decreasing number of levels; level-major within term)",
          notes = notes, software = versions(), points = pts), paste0("fixed_params/", id, ".json"))
  cat(id, vapply(pts, function(p) sprintf("%.6f", p$objective), ""), " maxdiff2nd", max(abs(vapply(pts, function(p) p$objective - p$objective_second_call, 0))), "\n")
}
fcb <- "cbind(incidence, size - incidence) ~ period + (1 | herd)"
bb <- list(rep(0, 4), c(-1, -.5, -1.5, -1), c(-1.4, -1, -1.1, -1.6)); tt <- list(0.05, 0.4, 1, 2.5)
for (k in c(1L, 2L, 9L, 25L)) GP(paste0("cbpp_nagq", k), "cbpp", fcb, nAGQ = k, betas = bb, thetas = tt)
for (l in c("probit", "cloglog", "cauchit")) GP(paste0("cbpp_", l), "cbpp", fcb, sprintf("binomial('%s')", l), betas = bb, thetas = list(.2, .8))
GP("cbpp_herd_obs", "cbpp", "cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)", betas = bb[1:2], thetas = list(c(.5, .3), c(1, 1)))
GP("toy15_nagq1", "toy15", "y ~ x1 + (1 | subject)", betas = list(c(0, 0), c(-3.3, 1), c(-3, 1.5)), thetas = list(.1, 1, 2.5), notes = "(-3.3, 1) are the values the data were simulated with, (-3, 1.5) common start values")
GP("toy15_nagq10", "toy15", "y ~ x1 + (1 | subject)", nAGQ = 10L, betas = list(c(0, 0), c(-3.3, 1)), thetas = list(.1, 1, 2.5))
f3 <- "use ~ age * ch + I(age^2) + urban + "
b3 <- list(rep(0, 6), c(-1.3, -.05, 1.2, -.006, .7, .07), c(-.5, .02, .3, -.001, -.2, -.02))
GP("contra_cm3", "Contraception", paste0(f3, "(1 | district)"), betas = b3, thetas = list(.2, .47, 1), notes = "beta order as in beta_names")
GP("contra_cm4", "Contraception", paste0(f3, "(urban | district)"), betas = b3, thetas = list(c(1, 0, 1), c(.6, -.5, .4), c(.3, .2, 0)))
GP("contra_cm5", "Contraception", paste0(f3, "(1 | urban:district) + (1 | district)"), betas = b3[1:2], thetas = list(c(1, 1), c(.5, .1), c(.3, 0)))
GP("grouse_full", "grouseticks", "TICKS ~ YEAR + cHEIGHT + (1 | BROOD) + (1 | INDEX) + (1 | LOCATION)", "poisson()", betas = list(c(0, 0, 0, 0), c(.4, 1.2, -1, -.02)), thetas = list(c(1, 1, 1), c(.54, .75, .53)))
if (file.exists("data/Owls.csv")) GP("owls_offset", "Owls", "SiblingNegotiation ~ FoodTreatment * SexParent + (1 | Nest)", "poisson()", offset = "logBroodSize", betas = list(rep(0, 4), c(.6, -.7, -.1, .1)), thetas = list(.2, 1))
GP("grouse_sqrt", "grouseticks", "TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", "poisson('sqrt')", betas = list(c(1.5, .5, -.4, -.01)), thetas = list(.3, 1))
GP("sleep_gamma_log", "sleepstudy", "Reaction ~ Days + (1 | Subject)", "Gamma('log')", betas = list(c(5.5, .03)), thetas = list(.5, 1.2), notes = "lme4's convention for the dispersion")
vb <- c(.2, .05, .3, -1, -2, -1); GP("verbagg", "VerbAgg", "r2 ~ Anger + Gender + btype + situ + (1 | id) + (1 | item)", betas = list(rep(0, 6), vb), thetas = list(c(1, 1), c(1.3, .5)))
## LMM criteria at fixed theta
LP <- function(id, dataset, formula, thetas, weights = NULL, notes = "") {
  d <- rd(dataset); env <- new.env(); env$d <- d; fo <- as.formula(formula, env = env); pts <- list()
  for (t in thetas) for (R in c(FALSE, TRUE)) {
    cl <- list(quote(lmer), formula = fo, data = quote(d), REML = R, devFunOnly = TRUE); if (!is.null(weights)) cl$weights <- parse(text = weights)[[1]]
    f <- suppressMessages(eval(as.call(cl), env)); v <- f(t); e <- environment(f)
    pts[[length(pts) + 1]] <- list(theta = I(t), REML = R, criterion = v, ldL2 = e$pp$ldL2(), ldRX2 = e$pp$ldRX2(), wrss = e$resp$wrss(), u_sumsq = e$pp$sqrL(1),
                                   beta = I(as.numeric(e$pp$beta(1))), u = I(head(as.numeric(e$pp$u(1)), 500)))
  }
  wj(list(id = id, dataset = dataset, formula = formula, weights = weights, notes = notes, software = versions(), points = pts), paste0("fixed_params/", id, ".json"))
  cat(id, vapply(pts, function(p) sprintf("%.6f", p$criterion), ""), "\n")
}
LP("lmm_sleep", "sleepstudy", "Reaction ~ Days + (Days | Subject)", list(c(1, 0, 1), c(.9, .02, .2), c(0, 0, .5)))
LP("lmm_sleep_weights", "sleepstudy", "Reaction ~ Days + (Days | Subject)", list(c(1, 0, 1), c(.9, .02, .2)), weights = "w")
LP("lmm_penicillin", "Penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)", list(c(1.2, 2.1), c(1, 1), c(0, 3)))
tracepts <- rbind(c(0.836158, 0.489669), c(0.00000, 0.0605665), c(0.000182491, 0.530484), c(0.0597687, 0.347260), c(0.287979, 0.373802), c(0.325504, 0.300787),
                 c(0.335765, 0.315397), c(0.336712, 0.313883), c(0.336117, 0.314549), c(0.336004, 0.314503), c(0.335972, 0.314546))
if (file.exists("data/classroom.csv")) LP("lmm_classroom", "classroom", "mathgain ~ mathkind + minority + ses + (1 | classid) + (1 | schoolid)", lapply(1:11, function(i) tracepts[i, ]),
   notes = "points along an optimizer trace (ML): 11466.913 11447.349 11415.114 11402.540 11392.970 11391.654 11391.532 ...")
LP("lmm_pastes", "Pastes", "strength ~ 1 + (1 | batch/cask)", list(c(1, 1), c(3, .5)))
LP("lmm_insteval", "InstEval", "y ~ service + (1 | s) + (1 | d) + (1 | dept:service)", list(c(.3, .4, .1)))
