# Standard errors of predictions by glmmTMB: predict(se.fit = TRUE) on the link scale, joint in theta, beta and b.
# Ages are in decades: predict() takes the Hessian by differences with steps of 0.001, too wide for the square of years.
# With REML, glmmTMB 1.1.5's re.form = NA leaves the covariance of the fixed effects out: not kept.
# Run in this folder: Rscript predict_se.R (R 4.2.2, glmmTMB 1.1.5, lme4, mlmRev, jsonlite).
suppressPackageStartupMessages({ library(glmmTMB); library(jsonlite) })
data(cbpp, package = "lme4"); data(sleepstudy, package = "lme4"); data(grouseticks, package = "lme4")
data(Contraception, package = "mlmRev")
cbpp$obs <- factor(seq_len(nrow(cbpp)))
Contraception$ch <- factor(ifelse(Contraception$livch == "0", "N", "Y"))
versions <- list(R = paste(R.version$major, R.version$minor, sep = "."),
                 glmmTMB = as.character(packageVersion("glmmTMB")), TMB = as.character(packageVersion("TMB")))

# the same parameters at a gradient of rounding size: Newton steps with TMB's exact gradient
polish <- function(m) {
  obj <- m$obj; x <- m$fit$par
  for (i in 1:3) { H <- optimHess(x, obj$fn, obj$gr); x <- x - solve(H, as.numeric(obj$gr(x))) }
  obj$fn(x)
  m$fit$par <- x; m$fit$parfull <- obj$env$last.par; obj$env$last.par.best <- obj$env$last.par
  m
}
pick <- function(p, rows) list(fit = I(unname(p$fit)[rows]), se = I(unname(p$se.fit)[rows]))

save1 <- function(id, dataset, formula, family, data, new, rows, REML = FALSE) {
  m <- polish(glmmTMB(as.formula(formula), data, family = family, REML = REML))
  out <- list(id = id, software = versions, dataset = dataset, formula = formula, REML = REML,
              objective = 2 * as.numeric(m$obj$fn(m$fit$par)), rows = I(rows), newdata = new,
              fit_rows = pick(predict(m, se.fit = TRUE, type = "link"), rows),
              fixed_only = if (!REML) pick(predict(m, se.fit = TRUE, type = "link", re.form = NA), rows),
              response = pick(predict(m, se.fit = TRUE, type = "response"), rows),
              new_rows = pick(predict(m, new, se.fit = TRUE, type = "link", allow.new.levels = TRUE), seq_len(nrow(new))))
  write_json(out, paste0(id, ".json"), auto_unbox = TRUE, digits = NA, null = "null")
  cat(id, out$objective, "\n")
}
save1("cbpp", "cbpp", "cbind(incidence, size - incidence) ~ period + (1 | herd)", binomial, cbpp,
      data.frame(period = c("1", "2", "4"), herd = c("1", "7", "99"), incidence = 1, size = 5), c(1:10, 50))
save1("cbpp_obs_cloglog", "cbpp", "cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)", binomial("cloglog"), cbpp,
      data.frame(period = c("1", "2", "4"), herd = c("1", "7", "99"), obs = c("1", "30", "99"), incidence = 1, size = 5),
      c(1:10, 50))
new <- data.frame(age = c(-10, 0, 5, 15), ch = c("N", "Y", "Y", "N"), urban = c("N", "Y", "N", "Y"),
                  district = c("1", "35", "61", "999"), use = "N")
save1("contra_cm3", "Contraception", "use ~ I(age/10) * ch + I(age^2/100) + urban + (1 | district)", binomial, Contraception, new,
      c(1:10, 1900))
save1("contra_cm4", "Contraception", "use ~ I(age/10) * ch + I(age^2/100) + urban + (urban | district)", binomial, Contraception, new,
      c(1:10, 1900))
new <- data.frame(Days = c(0, 3.5, 12), Subject = c("308", "335", "999"), Reaction = 0)
for (reml in c(FALSE, TRUE))
  save1(if (reml) "sleep_reml" else "sleep_ml", "sleepstudy", "Reaction ~ Days + (Days | Subject)", gaussian, sleepstudy,
        new, c(1:12, 180), REML = reml)
