# R's answers to the designs of designs.py: lme4 for all families but nbinom2, which is glmmTMB's.
#
#   Rscript answers.R fit DESIGNS.jsonl ANSWERS.jsonl        one line of JSON per design, in both; designs that
#                                                            ANSWERS.jsonl has already are passed over
#   Rscript answers.R evaluate REQUESTS.jsonl VALUES.jsonl   R's objective at given parameters: lines of a design
#                                                            with "theta", "beta" and "phi" added
#
# Controls are far tighter than R's defaults: PIRLS to 1e-12, bobyqa to 1e-9 in coordinates scaled by standard errors,
# from three starts and again where it ended, and nlminb; the best counts. Standard errors of glmer are of the
# Hessian in (theta, beta) by central differences. Log-likelihoods are absolute for every nAGQ.
suppressPackageStartupMessages({ library(lme4); library(glmmTMB); library(jsonlite); library(MASS) })
invisible(Sys.setlocale("LC_COLLATE", "C"))
options(warn = 1, contrasts = c("contr.treatment", "contr.poly"))
SECONDS <- 60

table_of <- function(columns) {
  as.data.frame(lapply(columns, function(column) {
    values <- column$values
    values[vapply(values, is.null, NA)] <- NA
    values <- unlist(values)
    if (is.null(column$levels)) values else factor(values, unlist(column$levels), ordered = column$ordered)
  }), stringsAsFactors = FALSE)
}

family_of <- function(r) switch(r$family,
  gaussian = gaussian(), nbinom2 = nbinom2(),
  negative.binomial = eval(bquote(MASS::negative.binomial(.(r$shape)))),
  do.call(r$family, if (is.null(r$link)) list() else list(r$link)))

# the call of an lme4 function on a design, so that weights and offset are found in the table
call_of <- function(f, r, ...) {
  d <- table_of(r$columns)
  if (is.character(d$y)) d$y <- factor(d$y)
  env <- new.env(parent = globalenv()); assign("d", d, envir = env)
  arguments <- list(formula = as.formula(r$formula, env), data = quote(d), ...)
  if (!is.null(r$weights)) arguments$weights <- as.name(r$weights)
  if (!is.null(r$offset)) arguments$offset <- as.name(r$offset)
  eval(as.call(c(f, arguments)), env)
}

loose <- function(control, ...) {
  checks <- list(check.nobs.vs.rankZ = "ignore", check.nobs.vs.nlev = "ignore", check.nlev.gtreq.5 = "ignore",
                 check.nlev.gtr.1 = "ignore", check.nobs.vs.nRE = "ignore", check.scaleX = "ignore")
  do.call(control, c(checks, list(...)))
}

# lme4's objective as a function of one vector, where it starts, and the basis of the coordinates for searches:
# par = start + basis z, diagonal for theta
problem <- function(r) {
  if (r$family == "gaussian") {
    parsed <- call_of(quote(lFormula), r, REML = r$REML, control = loose(lmerControl))
    fn <- do.call(mkLmerDevfun, parsed)
    theta <- theta_scale(parsed$reTrms)
    return(list(parsed = parsed, fn = fn, start = theta$start, start0 = theta$start, lower = parsed$reTrms$lower,
                basis = diag(0.3 * theta$steps, length(theta$steps)), unit = theta$steps, thetas = length(theta$start), constant = 0))
  }
  for (tolerance in c(1e-12, 1e-10, 1e-8)) {
    made <- tryCatch(glmm_problem(r, tolerance), error = function(e) e)
    if (!inherits(made, "error")) return(made)
  }
  stop(made)
}

glmm_problem <- function(r, tolerance) {
  parsed <- call_of(quote(glFormula), r, family = family_of(r), control = loose(glmerControl))
  parsed$control <- loose(glmerControl, tolPwrss = tolerance)
  fn <- do.call(mkGlmerDevfun, parsed)
  theta <- theta_scale(parsed$reTrms); lower <- parsed$reTrms$lower
  p <- list(parsed = parsed, fn = fn, start = theta$start, start0 = theta$start, lower = lower,
            basis = diag(0.3 * theta$steps, length(lower)), unit = theta$steps, thetas = length(lower), constant = 0)
  first <- minimise(p, tight = FALSE)
  fn(first$par)
  if (r$nAGQ == 0) return(modifyList(p, list(start = first$par)))
  pp <- environment(fn)$pp
  beta <- pp$beta(1)
  fn <- updateGlmerDevfun(fn, parsed$reTrms, nAGQ = r$nAGQ)
  p$fn <- fn; p$start <- c(first$par, beta); p$lower <- c(lower, rep(-Inf, length(beta)))
  p$basis <- as.matrix(bdiag(p$basis, pp$RXi()))      # coordinates of beta in which its information is near 1
  if (r$nAGQ > 1) p$constant <- saturated(environment(fn)$resp, r)
  value <- fn(p$start)
  if (!is.finite(value)) stop("no finite objective at the start")
  p
}

# -2 log-likelihood with every mean at its response, which lme4 leaves out for nAGQ > 1
saturated <- function(resp, r) {
  y <- resp$y; w <- resp$weights
  -2 * sum(switch(r$family, binomial = dbinom(round(w * y), round(w), y, log = TRUE), poisson = w * dpois(y, y, log = TRUE),
                  negative.binomial = w * dnbinom(y, size = r$shape, mu = y, log = TRUE)))
}

minimise <- function(p, tight = TRUE) {
  failed <- 0; t <- seq_len(p$thetas)
  at <- function(z) as.numeric(p$start + p$basis %*% z)
  f <- function(z) {
    v <- tryCatch(p$fn(at(z)), error = function(e) NA_real_)
    if (is.finite(v)) v else { failed <<- failed + 1; 1e10 }
  }
  steps <- diag(p$basis)[t]
  low <- c((p$lower[t] - p$start[t]) / steps, rep(-Inf, length(p$start) - p$thetas))
  best <- list(par = numeric(length(p$start)), value = f(numeric(length(p$start))))
  keep <- function(z, v) if (v < best$value) best <<- list(par = z, value = v)
  search <- function(z, rhobeg, rhoend) {
    o <- tryCatch(minqa::bobyqa(pmax(z, low), f, lower = low, control = list(rhobeg = rhobeg, rhoend = rhoend, maxfun = 5000)),
                  error = function(e) NULL)
    if (!is.null(o)) keep(o$par, o$fval)
  }
  search(best$par, 0.5, 1e-3)
  if (tight) {
    z <- best$par                                       # another valley: small theta, then large
    for (times in c(0.05, 3)) { z[t] <- (times * p$start0 - p$start[t]) / steps; search(z, 0.5, 1e-2) }
    for (round in 1:4) {
      before <- best$value
      search(best$par, 0.05, 1e-9)
      if (round == 1) {
        o <- tryCatch(nlminb(best$par, f, lower = low, control = list(rel.tol = 1e-15, x.tol = 1e-11, iter.max = 100, eval.max = 500)),
                      error = function(e) NULL)
        if (!is.null(o)) keep(o$par, o$objective)
      }
      if (before - best$value < 1e-8) break
    }
  }
  list(par = pmax(at(best$par), p$lower), value = best$value, failed = failed)
}

# theta where the search starts and its steps: those of columns of unit size, divided by the columns' root mean squares
theta_scale <- function(reTrms) {
  start <- reTrms$theta; at <- 0; steps <- numeric(0)
  for (i in seq_along(reTrms$cnms)) {
    k <- length(reTrms$cnms[[i]]); Zt <- reTrms$Ztlist[[i]]
    rms <- vapply(seq_len(k), function(j) { x <- Zt[seq(j, nrow(Zt), by = k), , drop = FALSE]@x; sqrt(mean(x[x != 0]^2)) }, 0)
    rms[!is.finite(rms) | rms <= 0] <- 1
    steps <- c(steps, 1 / rms[row(diag(k))[lower.tri(diag(k), diag = TRUE)]])
  }
  list(start = start * steps, steps = steps)
}

# covariance of (theta, beta): twice the inverse Hessian by central differences; directions without curvature left out.
# The objective is even in whole columns of the factor, so that thetas below their bound are evaluated as they are.
hessian_errors <- function(p, par) {
  k <- length(par); t <- seq_len(p$thetas)
  basis <- p$basis
  basis[cbind(t, t)] <- pmax(0.1 * abs(par[t]), 0.03 * p$unit)
  f <- function(z) tryCatch(p$fn(as.numeric(par + basis %*% z)), error = function(e) NA_real_)
  difference <- function(h) {
    H <- matrix(0, k, k); f0 <- f(numeric(k))
    e <- function(i) replace(numeric(k), i, h)
    plus <- vapply(seq_len(k), function(i) f(e(i)), 0); minus <- vapply(seq_len(k), function(i) f(-e(i)), 0)
    diag(H) <- (plus - 2 * f0 + minus) / h^2
    for (i in seq_len(k)) for (j in seq_len(i - 1))
      H[i, j] <- H[j, i] <- (f(e(i) + e(j)) - f(e(i) - e(j)) - f(e(j) - e(i)) + f(-e(i) - e(j))) / (4 * h^2)
    H
  }
  H <- (4 * difference(0.02) - difference(0.04)) / 3
  if (anyNA(H)) return(rep(NA_real_, k - p$thetas))
  d <- sqrt(pmax(abs(diag(H)), 1e-8)); R <- H / outer(d, d)
  ev <- eigen(R, symmetric = TRUE)
  use <- ev$values > 1e-5
  V <- 2 * (ev$vectors[, use, drop = FALSE] %*% (t(ev$vectors[, use, drop = FALSE]) / ev$values[use])) / outer(d, d)
  sqrt(diag(basis %*% V %*% t(basis)))[-t]
}

answer_lme4 <- function(r) {
  p <- problem(r)
  o <- minimise(p)
  t <- seq_len(p$thetas); theta <- o$par[t]
  if (o$value > 1e9) stop("every evaluation failed")
  p$fn(o$par)
  rho <- environment(p$fn); pp <- rho$pp
  X <- p$parsed$X
  if (r$family == "gaussian") {
    n <- nrow(X); k <- ncol(X)
    prss <- rho$resp$wrss() + pp$sqrL(1)
    sigma <- sqrt(prss / (if (r$REML) n - k else n))
    beta <- pp$beta(1); se <- sigma * sqrt(diag(pp$unsc()))
  } else {
    sigma <- 1
    if (r$nAGQ == 0) { beta <- pp$beta(1); se <- sqrt(diag(pp$unsc())) }
    else { beta <- o$par[-t]; se <- hessian_errors(p, o$par) }
  }
  cnms <- p$parsed$reTrms$cnms
  size <- lengths(cnms)
  at <- 0
  cov <- lapply(size, function(k) {
    T <- matrix(0, k, k); m <- k * (k + 1) / 2
    T[lower.tri(T, diag = TRUE)] <- theta[at + seq_len(m)]; at <<- at + m
    sigma^2 * T %*% t(T)
  })
  list(logLik = -0.5 * (o$value + p$constant), names = I(colnames(X)), fixef = I(beta), se = I(se), theta = I(theta), sigma = sigma,
       phi = NULL, cov = unname(Map(function(g, n, v) list(group = g, names = I(n), values = v), names(cnms), unname(cnms), unname(cov))),
       singular = any(theta[p$lower[t] == 0] < 1e-4), nobs = nrow(X), failed = o$failed)
}

tmb_fit <- function(r) {
  control <- glmmTMBControl(optCtrl = list(iter.max = 2000, eval.max = 3000, rel.tol = 1e-14))
  call_of(quote(glmmTMB), r, family = family_of(r), control = control)
}

answer_tmb <- function(r) {
  m <- tmb_fit(r)
  best <- m$fit$par; value <- m$obj$fn(best)
  for (start in list(best, replace(best, names(best) == "theta", -0.5), replace(best, names(best) == "betad", 2))) {
    o <- tryCatch(optim(start, m$obj$fn, m$obj$gr, method = "BFGS", control = list(maxit = 1000, reltol = 1e-15)), error = function(e) NULL)
    if (!is.null(o) && is.finite(o$value) && o$value < value) { best <- o$par; value <- o$value }
  }
  m$obj$fn(best)
  beta <- best[names(best) == "beta"]
  H <- tryCatch(optimHess(best, m$obj$fn, m$obj$gr), error = function(e) NULL)
  V <- if (is.null(H)) NULL else tryCatch(solve(H), error = function(e) NULL)
  se <- if (is.null(V) || any(diag(V) <= 0)) rep(NA_real_, length(beta)) else sqrt(diag(V))[names(best) == "beta"]
  report <- m$obj$report(m$obj$env$last.par)
  terms <- m$modelInfo$reStruc$condReStruc
  blocks <- m$modelInfo$reTrms$cond$cnms
  cov <- Map(function(C, s) { s <- as.numeric(s); C <- as.matrix(C); C * outer(s, s) }, report$corr, report$sd)
  sds <- unlist(report$sd)
  list(logLik = -value, names = I(names(which(!is.na(fixef(m)$cond)))), fixef = I(unname(beta)), se = I(unname(se)), theta = NULL, sigma = 1,
       phi = unname(exp(best[names(best) == "betad"])),
       cov = unname(Map(function(g, n, v) list(group = g, names = I(n), values = unname(v)), names(blocks), unname(blocks), unname(cov))),
       singular = any(sds < 1e-4) || any(vapply(cov, function(v) min(eigen(cov2cor(v + diag(1e-300, nrow(v))), symmetric = TRUE)$values) < 1e-6, NA)),
       nobs = nobs(m), failed = 0)
}

value_lme4 <- function(r) {
  p <- problem(r)
  par <- if (r$family == "gaussian" || r$nAGQ == 0) unlist(r$theta) else c(unlist(r$theta), unlist(r$beta))
  -0.5 * (p$fn(par) + p$constant)
}

# lme4's theta -> glmmTMB's: logs of standard deviations, then the scaled factor of the correlations (two columns at most)
value_tmb <- function(r) {
  m <- tmb_fit(r)
  theta <- unlist(r$theta); at <- 0; out <- numeric(0)
  for (k in lengths(m$modelInfo$reTrms$cond$cnms)) {
    T <- matrix(0, k, k); count <- k * (k + 1) / 2
    T[lower.tri(T, diag = TRUE)] <- theta[at + seq_len(count)]; at <- at + count
    V <- T %*% t(T); sd <- pmax(sqrt(diag(V)), 1e-9)
    out <- c(out, log(sd))
    if (k == 2) { rho <- max(min(V[1, 2] / prod(sd), 1 - 1e-12), -1 + 1e-12); out <- c(out, rho / sqrt(1 - rho^2)) }
    if (k > 2) stop("three columns")
  }
  -m$obj$fn(c(unlist(r$beta), log(unlist(r$phi)), out))
}

timed <- function(f) {
  heard <- character(0)
  hear <- function(c, restart) { heard <<- c(heard, trimws(conditionMessage(c))); invokeRestart(restart) }
  setTimeLimit(elapsed = SECONDS, transient = TRUE)
  on.exit(setTimeLimit(elapsed = Inf))
  result <- tryCatch(withCallingHandlers(f(), warning = function(w) hear(w, "muffleWarning"), message = function(m) hear(m, "muffleMessage")),
                     error = function(e) list(error = conditionMessage(e)))
  c(result, list(messages = I(unique(substr(heard, 1, 200)))))
}

main <- function(mode, source, target) {
  done <- if (file.exists(target)) vapply(strsplit(readLines(target), ","), function(x) sub("[^0-9]*", "", x[1]), "") else character(0)
  input <- file(source, "r"); output <- file(target, "a")
  repeat {
    line <- readLines(input, 1)
    if (!length(line)) break
    r <- fromJSON(line, simplifyVector = FALSE)
    if (as.character(r$seed) %in% done) next
    tmb <- r$family == "nbinom2"
    f <- if (mode == "fit") function() if (tmb) answer_tmb(r) else answer_lme4(r)
         else function() list(logLik = if (tmb) value_tmb(r) else value_lme4(r))
    took <- system.time(found <- timed(f))[["elapsed"]]
    writeLines(toJSON(c(list(seed = r$seed), found, list(seconds = round(took, 2))), auto_unbox = TRUE, digits = NA, na = "null", null = "null"), output)
    flush(output)
  }
  close(input); close(output)
}

arguments <- commandArgs(TRUE)
if (length(arguments) == 3) main(arguments[1], arguments[2], arguments[3])
