# Helpers shared by the scripts that generate the reference results.
# All paths are relative to the folder that holds this file (the working directory).
suppressPackageStartupMessages({
  library(lme4); library(jsonlite); library(MASS); library(numDeriv)
})
options(warn = 1, contrasts = c("contr.treatment", "contr.poly"))
for (d in c("data", "models", if (basename(getwd()) == "reference") c("inference", "fixed_params", "exact_marginal")))
  dir.create(d, showWarnings = FALSE)

DATA <- new.env()                       # name -> data frame (kept with full precision)

# ---------------------------------------------------------------- data sets
save_data <- function(name, df, package, item = name, source = "", licence = "GPL (>= 2)",
                      notes = "", gz = NULL) {
  df <- as.data.frame(df); rownames(df) <- NULL
  assign(name, df, envir = DATA)
  if (is.null(gz)) gz <- nrow(df) * ncol(df) > 60000
  file <- paste0("data/", name, if (gz) ".csv.gz" else ".csv")
  con <- if (gz) gzfile(file, "w") else file(file, "w")
  write.csv(df, con, row.names = FALSE, na = "", quote = which(!vapply(df, is.numeric, NA)))
  close(con)
  cols <- lapply(names(df), function(v) {
    x <- df[[v]]
    out <- list(name = v, type = if (is.ordered(x)) "ordered" else if (is.factor(x)) "factor"
                else if (is.integer(x)) "integer" else if (is.logical(x)) "logical"
                else if (is.numeric(x)) "numeric" else class(x)[1])
    if (is.factor(x)) {
      out$levels <- levels(x); out$n_levels <- nlevels(x); out$reference <- levels(x)[1]
      out$default_contrasts <- if (is.ordered(x)) "contr.poly" else "contr.treatment"
      if (length(out$levels) == 1) out$levels <- I(out$levels)
    }
    if (anyNA(x)) out$n_missing <- sum(is.na(x))
    out
  })
  write_json(list(name = name, file = basename(file), nrow = nrow(df), ncol = ncol(df),
                  package = package, package_version = tryCatch(as.character(packageVersion(package)),
                                                                error = function(e) NA),
                  item = item, source = source, licence = licence, notes = notes, columns = cols),
             paste0("data/", name, ".json"), auto_unbox = TRUE, pretty = TRUE, digits = NA, na = "null", null = "null")
  invisible(df)
}

data_readme <- function() {
  fs <- sort(list.files("data", "\\.json$", full.names = TRUE))
  rows <- vapply(fs, function(f) {
    j <- fromJSON(f, simplifyVector = FALSE)
    cols <- paste(vapply(j$columns, function(k) sprintf("%s (%s%s)", k$name, k$type,
      if (!is.null(k$n_levels)) paste0(" ", k$n_levels, ", ref ", k$reference) else ""), ""), collapse = "; ")
    sprintf("| `%s` | %d | %s::%s %s | %s | %s | %s |", j$file, j$nrow, j$package, j$item,
            if (length(j$package_version) && is.character(j$package_version)) j$package_version else "", j$licence, cols, j$notes)
  }, "")
  writeLines(c("# Data sets", "",
    "Each `NAME.csv` (or `NAME.csv.gz`) has a sidecar `NAME.json` with the column types and, for factors,",
    "the level order used by R (the first level is the reference level of treatment contrasts; ordered",
    "factors use polynomial contrasts by default). Missing values are empty cells. Factor columns must be",
    "rebuilt with exactly these levels, in this order, to reproduce R's coefficient names and group order.", "",
    "| file | rows | source | licence of the source | columns | notes |", "|---|---|---|---|---|---|", rows, ""),
    "data/README.md")
}

# ---------------------------------------------------------------- small utilities
nv <- function(x) list(names = I(as.character(names(x))), values = I(unname(as.numeric(x))))
mat <- function(x, nm = rownames(x)) list(names = I(as.character(nm)), values = unname(as.matrix(x)))
wj <- function(x, file) write_json(x, file, auto_unbox = TRUE, pretty = FALSE, digits = NA, na = "null", null = "null")
versions <- function(...) {
  p <- c("lme4", "Matrix", ...)
  c(list(R = paste(R.version$major, R.version$minor, sep = ".")),
    setNames(lapply(p, function(i) as.character(packageVersion(i))), p))
}
parse_family <- function(s) if (is.null(s)) NULL else eval(parse(text = s))

# 4-point central gradient and central Hessian on a scaled coordinate z (par = p0 + s*z)
fd_grad <- function(f, z, free, h = 1e-2) {
  g <- numeric(length(z))
  for (i in which(free)) {
    e <- replace(numeric(length(z)), i, h)
    g[i] <- (8 * (f(z + e) - f(z - e)) - (f(z + 2 * e) - f(z - 2 * e))) / (12 * h)
  }
  g
}
fd_hess <- function(f, z, free, h = 2e-2) {
  k <- length(z); H <- matrix(0, k, k); f0 <- f(z); id <- which(free)
  E <- function(i) replace(numeric(k), i, h)
  fp <- fm <- numeric(k)
  for (i in id) { fp[i] <- f(z + E(i)); fm[i] <- f(z - E(i)); H[i, i] <- (fp[i] - 2 * f0 + fm[i]) / h^2 }
  for (a in seq_along(id)) for (b in seq_len(a - 1)) {
    i <- id[a]; j <- id[b]
    H[i, j] <- H[j, i] <- (f(z + E(i) + E(j)) - f(z + E(i) - E(j)) - f(z - E(i) + E(j)) + f(z - E(i) - E(j))) / (4 * h^2)
  }
  H
}

# Newton polishing of a deviance function followed by a second optimizer (nlminb), in scaled coordinates.
polish <- function(fn, par, lower, scale, maxit = 12, second = TRUE, hess = TRUE, verbose = FALSE) {
  scale[!is.finite(scale) | scale <= 0] <- 1
  nfail <- 0                                                  # failed evaluations (counted afresh for the final derivatives)
  f <- function(z) { p <- par + scale * z; p <- pmax(p, lower)
    v <- tryCatch(fn(p), error = function(e) NA_real_); if (is.finite(v)) v else { nfail <<- nfail + 1; 1e100 } }
  z <- numeric(length(par)); fz <- f(z); dec <- NA; nit <- 0
  atbound <- function(z) is.finite(lower) & (par + scale * z - lower) < 1e-7
  for (nit in seq_len(maxit)) {
    ab <- atbound(z); free <- !ab
    near <- is.finite(lower) & (par + scale * z - lower) < 5e-2 * scale      # too near for central differences
    free <- free & !near
    g <- fd_grad(f, z, free); H <- fd_hess(f, z, free)
    id <- which(free); if (!length(id)) break
    Hi <- H[id, id, drop = FALSE]; ev <- eigen(Hi, symmetric = TRUE)
    lam <- pmax(abs(ev$values), 1e-6 * max(abs(ev$values)))
    st <- -as.numeric(ev$vectors %*% (crossprod(ev$vectors, g[id]) / lam))
    dec <- 0.5 * sum(g[id]^2 * 0 + (-st) * g[id]); a <- 1
    repeat { zn <- z; zn[id] <- z[id] + a * st
      zn <- pmax(zn, ifelse(is.finite(lower), (lower - par) / scale, -Inf)); fn1 <- f(zn)
      if (fn1 <= fz + 1e-10 || a < 1e-4) break; a <- a / 2 }
    if (fn1 <= fz + 1e-10) { z <- zn; fz <- fn1 }
    if (verbose) cat("   newton", nit, format(fz, digits = 14), "dec", dec, "step", a, "\n")
    if (abs(dec) < 1e-11 || a < 1e-4) break
  }
  newton <- fz
  sec <- NA
  if (second) {
    lo <- ifelse(is.finite(lower), (lower - par) / scale, -Inf)
    o <- tryCatch(nlminb(z, f, lower = lo, control = list(rel.tol = 1e-15, x.tol = 1e-10, iter.max = 60, eval.max = 400)),
                  error = function(e) NULL)
    if (!is.null(o)) { sec <- o$objective; if (o$objective < fz - 1e-10) { z <- o$par; fz <- o$objective } }
  }
  ab <- atbound(z); near <- is.finite(lower) & (par + scale * z - lower) < 5e-2 * scale
  free <- !ab & !near; nfail <- 0
  g <- fd_grad(f, z, free); H <- if (hess) fd_hess(f, z, free) else NULL
  p <- pmax(par + scale * z, lower); p[ab] <- lower[ab]
  vc <- NULL
  if (hess && all(free)) vc <- tryCatch({ V <- 2 * solve(H); V * outer(scale, scale) }, error = function(e) NULL)
  id <- which(free)
  list(par = p, fval = fn(p), grad_scaled = g, max_abs_grad_scaled = max(abs(g)),
       max_abs_grad = max(abs(g / scale)), at_bound = which(ab), decrement = dec,
       newton_iterations = nit, newton_fval = newton, second_optimizer_fval = sec, scale = scale, vcov = vc, nfail = nfail)
}

# A no-op optimizer: evaluates the objective at the given start, so that a standard merMod object is
# built exactly at the polished parameters.
nopt <- function(fn, par, lower, upper, control = list(), ...) list(par = par, fval = fn(par), feval = 1L, convergence = 0L, message = "fixed parameters")

timeit <- function(expr, envir, reps = 3) {
  t <- numeric(0); v <- NULL
  for (i in seq_len(reps)) {
    gc(FALSE); s <- system.time(v <- suppressMessages(suppressWarnings(eval(expr, envir))))[["elapsed"]]
    t <- c(t, s); if (s > 20) break
  }
  list(elapsed = median(t), reps = length(t), fit = v)
}

INDEX <- list()
add_index <- function(id, dataset, formula, family, n, logLik, wall, engine) {
  row <- list(id = id, dataset = dataset, formula = formula, family = family, n = n, logLik = logLik,
              default_wall_s = wall, engine = engine)
  INDEX[[id]] <<- row
  cat(sprintf("[%s] %-34s n=%d logLik=%.8f default %.3fs\n", format(Sys.time(), "%H:%M:%S"), id, n, logLik, wall))
}

# ---------------------------------------------------------------- extraction
sub20 <- function(x) I(unname(head(as.numeric(x), 20)))
extract_mer <- function(m) {
  glmm <- isGLMM(m)
  th <- getME(m, "theta"); lw <- getME(m, "lower")
  V <- function(h) tryCatch({ v <- suppressWarnings(vcov(m, use.hessian = h)); mat(v) }, error = function(e) NULL)
  vcmp <- lapply(names(VarCorr(m)), function(g) {
    S <- VarCorr(m)[[g]]
    list(group = g, names = I(rownames(S)), sd = I(unname(attr(S, "stddev"))), cov = unname(matrix(S, nrow(S))),
         corr = unname(matrix(attr(S, "correlation"), nrow(S))))
  })
  re <- tryCatch(ranef(m, condVar = TRUE), error = function(e) ranef(m, condVar = FALSE))
  rel <- lapply(re, function(x) list(names = I(names(x)), levels = I(rownames(x)), values = unname(as.matrix(x))))
  cv <- lapply(re, function(x) { pv <- attr(x, "postVar"); if (is.null(pv)) return(NULL)
    if (is.list(pv)) lapply(pv, function(a) I(aperm(unname(a), c(3, 1, 2)))) else {
      if (dim(pv)[1] == 1) I(as.numeric(pv)) else aperm(unname(pv), c(3, 1, 2)) } })
  rt <- c("response", "pearson", if (glmm) c("deviance", "working"))
  dc <- getME(m, "devcomp")
  ll <- logLik(m)
  r <- list(
    nobs = nobs(m), ngrps = as.list(ngrps(m)), n_re = length(getME(m, "u")),
    fixef = nv(fixef(m)),
    se = I(unname(sqrt(diag(as.matrix(suppressWarnings(vcov(m))))))),
    vcov = V(TRUE), vcov_RX = if (glmm) V(FALSE) else NULL,
    theta = list(names = I(names(th)), values = I(unname(th)), lower = I(unname(lw))),
    VarCorr = vcmp, sigma = sigma(m), useSc = as.logical(dc$dims[["useSc"]]),
    logLik = as.numeric(ll), df = attr(ll, "df"), minus2logLik = -2 * as.numeric(ll),
    AIC = AIC(m), BIC = BIC(m),
    deviance = tryCatch(if (glmm) deviance(m) else deviance(m, REML = FALSE), error = function(e) NULL),
    devcrit = lme4:::devCrit(m), REMLcrit = if (isREML(m)) REMLcrit(m) else NULL,
    sum_deviance_residuals_sq = if (glmm) sum(residuals(m, "deviance")^2) else NULL,
    devcomp_cmp = as.list(dc$cmp),
    ranef = rel, condVar = cv,
    fitted_first20 = sub20(fitted(m)),
    linear_predictor_first20 = sub20(predict(m, type = "link")),
    residuals_first20 = setNames(lapply(rt, function(t) sub20(residuals(m, type = t))), rt),
    fitted_sum = sum(fitted(m)), fitted_sumsq = sum(fitted(m)^2),
    isSingular = isSingular(m))
  if (r$n_re <= 3000) r$u <- I(as.numeric(getME(m, "u")))
  r
}

# ---------------------------------------------------------------- lmer / glmer
fit_mer <- function(id, dataset, formula, family = NULL, nAGQ = 1L, REML = TRUE, weights = NULL, offset = NULL,
                    notes = "", tol = 1e-15, polish_hess = TRUE, reps = 3, write = TRUE,
                    start = NULL, default_optimizer = NULL, polish_maxit = 12, second = TRUE) {
  df <- DATA[[dataset]]; env <- new.env(parent = globalenv()); assign(dataset, df, envir = env)
  fo <- as.formula(formula, env = env); glmm <- !is.null(family)
  base <- list(if (glmm) quote(glmer) else quote(lmer), formula = fo, data = as.name(dataset))
  if (glmm) { base$family <- parse(text = family)[[1]]; base$nAGQ <- nAGQ } else base$REML <- REML
  if (!is.null(weights)) base$weights <- parse(text = weights)[[1]]
  if (!is.null(offset)) base$offset <- parse(text = offset)[[1]]
  ctrlf <- if (glmm) "glmerControl" else "lmerControl"
  defc <- as.call(base)
  if (!is.null(default_optimizer)) defc$control <- do.call(ctrlf, list(optimizer = default_optimizer))
  # REFINE=1: start from the stored optimum of models/ID.json instead of fitting from scratch
  jf <- paste0("models/", id, ".json"); old <- NULL
  if (nzchar(Sys.getenv("REFINE"))) { if (!glmm || !file.exists(jf)) return(invisible(NULL)); old <- fromJSON(jf, simplifyVector = FALSE); second <- FALSE; polish_maxit <- 5 }
  tm <- if (!is.null(old)) list(elapsed = old$default_fit$elapsed_s, reps = 0, fit = NULL)
        else tryCatch(timeit(defc, env, reps), error = function(e) list(elapsed = NA, reps = 0, fit = NULL, error = conditionMessage(e)))
  # warnings of the default fit
  msgs <- if (!is.null(tm$fit)) unlist(tm$fit@optinfo$conv$lme4$messages) else tm$error
  quiet <- function(e) suppressMessages(suppressWarnings(e))
  run <- function(tol) {
    mk <- function(opt, optCtrl, derivs, ...) {
      a <- list(optimizer = opt, optCtrl = optCtrl, calc.derivs = derivs, check.conv.singular = "ignore",
                check.conv.grad = "ignore", check.conv.hess = "ignore")
      if (glmm) a$tolPwrss <- tol
      do.call(ctrlf, a)
    }
    cl <- base; cl$control <- mk(if (is.null(old)) "bobyqa" else "nopt", if (is.null(old)) list(maxfun = 1e6, rhoend = 1e-8) else list(), FALSE)
    if (!is.null(start)) cl$start <- start
    if (!is.null(old)) { ov <- function(k) as.numeric(unlist(old$results[[k]]$values)); cl$start <- if (nAGQ > 0) list(theta = ov("theta"), fixef = ov("fixef")) else list(theta = ov("theta")) }
    m1 <- tryCatch(quiet(eval(as.call(cl), env)), error = function(e) NULL)
    if (is.null(m1) && !is.null(old)) stop("no evaluation at the stored optimum")
    if (is.null(m1)) {
      cl$control <- mk(c("Nelder_Mead", "Nelder_Mead"), list(maxfun = 1e5), FALSE)
      m1 <- quiet(eval(as.call(cl), env))
    }
    cl <- base; cl$control <- mk("bobyqa", list(), FALSE); cl$devFunOnly <- TRUE
    fn <- quiet(eval(as.call(cl), env))
    th <- getME(m1, "theta"); lw <- getME(m1, "lower")
    if (glmm && nAGQ > 0) {
      b <- fixef(m1); par <- c(th, b); lower <- c(lw, rep(-Inf, length(b)))
      sc <- c(pmax(0.1 * abs(th), 0.03), sqrt(diag(as.matrix(vcov(m1, use.hessian = FALSE)))))
    } else { par <- th; lower <- lw; sc <- pmax(0.1 * abs(th), 0.02) }
    # several default-start candidates: keep the better of default fit and bobyqa fit
    if (!is.null(tm$fit)) {
      td <- getME(tm$fit, "theta"); pd <- if (glmm && nAGQ > 0) c(td, fixef(tm$fit)) else td
      f1 <- fn(par); f2 <- tryCatch(fn(pd), error = function(e) Inf)
      if (is.finite(f2) && f2 < f1 - 1e-9) par <- pd
    }
    po <- polish(fn, unname(par), lower, unname(sc), hess = polish_hess, maxit = polish_maxit, second = second)
    if (glmm && po$nfail > 0 && tol < 1e-11) stop("failed PIRLS evaluations near the optimum")
    # final object at the polished parameters
    cl <- base; cl$control <- mk("nopt", list(), TRUE)
    k <- length(th)
    cl$start <- if (glmm && nAGQ > 0) list(theta = po$par[1:k], fixef = po$par[-(1:k)]) else if (glmm) list(theta = po$par) else list(theta = po$par)
    m <- quiet(eval(as.call(cl), env))
    list(m = m, po = po, k = k)
  }
  res <- NULL; err <- NULL
  for (tt in if (glmm) unique(c(tol, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7)) else NA) {
    res <- tryCatch(run(tt), error = function(e) { err <<- conditionMessage(e); NULL })
    if (!is.null(res)) break
  }
  if (is.null(res)) { cat("FAILED", id, err, "\n"); return(invisible(NULL)) }
  m <- res$m; po <- res$po
  out <- extract_mer(m)
  if (glmm && nAGQ > 0 && !is.null(po$vcov)) {
    id2 <- (res$k + 1):length(po$par)
    nm <- names(fixef(m)); out$vcov_numeric <- list(names = I(nm), values = unname(po$vcov[id2, id2, drop = FALSE]))
    out$vcov_lme4_fd <- out$vcov; out$se_lme4_fd <- out$se        # lme4's finite differences: noisy in the 3rd-4th digit
    out$vcov <- out$vcov_numeric; out$se <- I(sqrt(diag(po$vcov))[id2]); out$vcov_numeric <- NULL
    out$vcov_source <- "2 x inverse of the joint deviance Hessian, central differences in scaled coordinates"
    out$joint_vcov_theta_beta_numeric <- unname(po$vcov)
  }
  out$optimum <- list(newton_fval = po$newton_fval, second_optimizer_fval = po$second_optimizer_fval,
    final_fval = po$fval, max_abs_gradient = po$max_abs_grad, max_abs_gradient_scaled = po$max_abs_grad_scaled,
    scale = I(po$scale), newton_decrement = po$decrement, theta_at_bound = I(as.integer(po$at_bound)))
  fam <- if (glmm) family(m) else list(family = "gaussian", link = "identity")
  rec <- list(id = id, dataset = dataset, data_file = basename(list.files("data", paste0("^", dataset, "\\.csv"))[1]),
    formula = formula, family = fam$family, link = fam$link, family_call = family,
    nAGQ = if (glmm) nAGQ else NULL, REML = if (glmm) NULL else REML, weights = weights, offset = offset,
    engine = if (glmm) "lme4::glmer" else "lme4::lmer", software = versions("minqa", "nloptr"),
    control = list(optimizer = "bobyqa(rhoend=1e-8, maxfun=1e6), then Newton with central differences in scaled coordinates, then nlminb(rel.tol=1e-15)",
                   tolPwrss = if (glmm) tt else NULL, calc.derivs = TRUE),
    notes = notes, results = out,
    default_fit = list(elapsed_s = tm$elapsed, reps = tm$reps,
      logLik = if (is.null(tm$fit)) NULL else as.numeric(logLik(tm$fit)), messages = I(as.character(msgs)),
      optimizer = if (is.null(tm$fit)) NULL else tm$fit@optinfo$optimizer, feval = if (is.null(tm$fit)) NULL else tm$fit@optinfo$feval,
      fixef = if (is.null(tm$fit)) NULL else I(unname(fixef(tm$fit))), theta = if (is.null(tm$fit)) NULL else I(unname(getME(tm$fit, "theta")))))
  if (!is.null(old)) { rec$default_fit <- old$default_fit
    rec$results$optimum$first_pass_fval <- old$results$optimum$final_fval; rec$results$optimum$second_optimizer_fval <- old$results$optimum$second_optimizer_fval
    cat(sprintf("   refine tol %g: logLik %.9f -> %.9f\n", tt, old$results$logLik, out$logLik)) }
  if (write) wj(rec, paste0("models/", id, ".json"))
  add_index(id, dataset, formula, paste0(fam$family, "(", fam$link, ")", if (glmm) paste0(" nAGQ=", nAGQ) else if (REML) " REML" else " ML"),
            out$nobs, out$logLik, if (is.null(tm$elapsed)) NA else tm$elapsed, rec$engine)
  invisible(list(m = m, rec = rec, po = po, default = tm$fit))
}

# Negative binomial by glmer: profile over the NB size parameter with tightly converged inner fits.
fit_glmer_nb <- function(id, dataset, formula, offset = NULL, notes = "", reps = 3) {
  df <- DATA[[dataset]]; env <- new.env(parent = globalenv()); assign(dataset, df, envir = env)
  fo <- as.formula(formula, env = env)
  cl <- list(quote(glmer.nb), formula = fo, data = as.name(dataset))
  if (!is.null(offset)) cl$offset <- parse(text = offset)[[1]]
  tm <- timeit(as.call(cl), env, reps)
  th0 <- getME(tm$fit, "glmer.nb.theta")
  inner <- function(lt) {
    b <- list(quote(glmer), formula = fo, data = as.name(dataset), family = bquote(negative.binomial(theta = .(exp(lt)))))
    if (!is.null(offset)) b$offset <- parse(text = offset)[[1]]
    b$control <- glmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 1e6, rhoend = 1e-9), tolPwrss = 1e-14, calc.derivs = FALSE)
    suppressMessages(suppressWarnings(eval(as.call(b), env)))
  }
  o <- optimize(function(lt) -as.numeric(logLik(inner(lt))), log(th0) + c(-0.05, 0.05), tol = 1e-6)
  fam <- sprintf("negative.binomial(theta=%.15g)", exp(o$minimum))
  r <- fit_mer(id, dataset, formula, family = fam, offset = offset, notes = notes, reps = 1, write = FALSE)
  r$rec$nb_theta <- exp(o$minimum); r$rec$family <- "negative.binomial"; r$rec$engine <- "lme4::glmer.nb"
  r$rec$notes <- paste(notes, "nb_theta is the NB size (var = mu + mu^2/theta), found by a one-dimensional search over tightly converged inner fits; lme4 counts it in df of glmer.nb fits (df here is that of the fixed-theta fit, one less).")
  r$rec$default_fit <- list(elapsed_s = tm$elapsed, reps = tm$reps, logLik = as.numeric(logLik(tm$fit)), nb_theta = th0)
  wj(r$rec, paste0("models/", id, ".json"))
  add_index(id, dataset, formula, "negative.binomial(log)", r$rec$results$nobs, r$rec$results$logLik, tm$elapsed, "lme4::glmer.nb")
  invisible(r)
}

# ---------------------------------------------------------------- glmmTMB
tmb_opt <- function(par, fn, gr, control = list(), ...) {
  o <- nlminb(par, fn, gr, control = list(iter.max = 2000, eval.max = 4000))
  for (k in 1:3) {
    o2 <- tryCatch(optim(o$par, fn, gr, method = "BFGS", control = list(reltol = 1e-15, maxit = 500)), error = function(e) NULL)
    if (!is.null(o2) && is.finite(o2$value) && o2$value <= o$objective) { o$par <- o2$par; o$objective <- o2$value }
    g <- as.numeric(gr(o$par))
    H <- tryCatch(optimHess(o$par, fn, gr), error = function(e) NULL); if (is.null(H)) next
    st <- tryCatch(solve(H, g), error = function(e) NULL); if (is.null(st) || any(!is.finite(st))) next
    p <- o$par - st; v <- fn(p); if (is.finite(v) && v <= o$objective + 1e-9) { o$par <- p; o$objective <- v }
    if (max(abs(gr(o$par))) < 1e-7) break
  }
  o$objective <- fn(o$par); o$convergence <- 0L; o
}
fit_tmb <- function(id, dataset, formula, family = "gaussian()", ziformula = "~0", dispformula = "~1", REML = FALSE,
                    weights = NULL, offset = NULL, notes = "", reps = 3) {
  if (nzchar(Sys.getenv("REFINE"))) return(invisible(NULL))
  suppressPackageStartupMessages(library(glmmTMB))
  df <- DATA[[dataset]]; env <- new.env(parent = globalenv()); assign(dataset, df, envir = env)
  base <- list(quote(glmmTMB), formula = as.formula(formula, env = env), data = as.name(dataset),
               family = parse(text = family)[[1]], ziformula = as.formula(ziformula, env = env),
               dispformula = as.formula(dispformula, env = env), REML = REML)
  if (!is.null(weights)) base$weights <- parse(text = weights)[[1]]
  if (!is.null(offset)) base$offset <- parse(text = offset)[[1]]
  tm <- tryCatch(timeit(as.call(base), env, reps), error = function(e) { cat("FAILED", id, conditionMessage(e), "\n"); NULL })
  if (is.null(tm)) return(invisible(NULL))
  cl <- base; cl$control <- quote(glmmTMBControl(optimizer = tmb_opt))
  wn <- character(0)
  m <- withCallingHandlers(eval(as.call(cl), env), warning = function(w) { wn <<- c(wn, conditionMessage(w)); invokeRestart("muffleWarning") })
  p <- m$fit$par; fe <- fixef(m); pl <- m$obj$env$parList(m$fit$par)
  g <- as.numeric(m$obj$gr(p)); S <- tryCatch(vcov(m), error = function(e) NULL); ll <- logLik(m)
  vc <- VarCorr(m)
  vcl <- lapply(Filter(length, vc), function(comp) lapply(names(comp), function(gr) { Sg <- comp[[gr]]
    list(group = gr, names = I(rownames(Sg)), sd = I(unname(attr(Sg, "stddev"))), corr = unname(matrix(attr(Sg, "correlation"), nrow(Sg)))) }))
  re <- tryCatch(ranef(m, condVar = TRUE), error = function(e) NULL)
  rel <- if (!is.null(re)) lapply(Filter(length, list(cond = re$cond, zi = re$zi)), function(comp) lapply(comp, function(x)
    list(names = I(names(x)), levels = I(rownames(x)), values = unname(as.matrix(x)),
         condVar = { a <- attr(x, "condVar"); f <- function(b) aperm(unname(b), c(3, 1, 2)); if (is.null(a)) NULL else if (is.list(a)) unname(lapply(a, f)) else f(a) })))
  fam <- m$modelInfo$family
  tr <- function(e) tryCatch(e, error = function(err) NULL)
  out <- list(nobs = nobs(m), ngrps = tr(as.list(summary(m)$ngrps$cond)),
    fixef = lapply(Filter(length, list(cond = fe$cond, zi = fe$zi, disp = fe$disp)), nv),
    vcov = lapply(Filter(length, list(cond = S$cond, zi = S$zi, disp = S$disp)), mat),
    tmb_parameters = list(names = I(names(p)), values = I(unname(p))), theta = I(unname(pl$theta)), thetazi = I(unname(pl$thetazi)),
    betad = I(unname(pl$betad)), sigma = tr(sigma(m)), family_dispersion_meaning = "see glmmTMB's sigma.glmmTMB", VarCorr = vcl,
    logLik = as.numeric(ll), df = attr(ll, "df"), minus2logLik = -2 * as.numeric(ll), AIC = AIC(m), BIC = BIC(m),
    ranef = rel, fitted_first20 = sub20(fitted(m)), fitted_sum = sum(fitted(m)),
    predict_first20 = list(conditional = tr(sub20(predict(m, type = "conditional"))), zprob = tr(sub20(predict(m, type = "zprob"))),
                           response = tr(sub20(predict(m, type = "response"))), link = tr(sub20(predict(m, type = "link")))),
    residuals_first20 = list(response = tr(sub20(residuals(m, "response"))), pearson = tr(sub20(residuals(m, "pearson")))),
    optimum = list(max_abs_gradient = max(abs(g)), pdHess = m$sdr$pdHess), warnings = I(wn))
  rec <- list(id = id, dataset = dataset, data_file = basename(list.files("data", paste0("^", dataset, "\\.csv"))[1]),
    formula = formula, ziformula = ziformula, dispformula = dispformula, family = fam$family, link = fam$link, family_call = family,
    REML = REML, weights = weights, offset = offset, engine = "glmmTMB::glmmTMB", software = versions("glmmTMB", "TMB"),
    control = list(optimizer = "nlminb, then BFGS(reltol=1e-15), then Newton steps with the automatic-differentiation gradient"),
    notes = notes, results = out,
    default_fit = list(elapsed_s = tm$elapsed, reps = tm$reps, logLik = as.numeric(logLik(tm$fit))))
  wj(rec, paste0("models/", id, ".json"))
  add_index(id, dataset, formula, paste0(fam$family, "(", fam$link, ")", if (ziformula != "~0") paste0(" zi=", ziformula)),
            out$nobs, out$logLik, tm$elapsed, "glmmTMB")
  invisible(list(m = m, rec = rec))
}

write_index <- function(file = "index.json") {
  old <- if (file.exists(file)) fromJSON(file, simplifyVector = FALSE) else list()
  names(old) <- vapply(old, function(r) r$id, "")
  for (k in names(INDEX)) old[[k]] <- INDEX[[k]]
  wj(unname(old), file)
}
