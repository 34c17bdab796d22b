# Inference references: inference/*.json (profiles, intervals, likelihood-ratio tables, drop1, predictions, moments of simulate()).
source("lib.R"); suppressPackageStartupMessages({ library(mlmRev); library(lmerTest); library(pbkrtest) })
lmer <- lme4::lmer
rd <- function(n) { j <- fromJSON(paste0("data/", n, ".json"), simplifyVector = FALSE); d <- read.csv(paste0("data/", j$file))
  for (k in j$columns) if (k$type %in% c("factor", "ordered")) d[[k$name]] <- factor(as.character(d[[k$name]]), levels = unlist(k$levels), ordered = k$type == "ordered"); d }
cbpp <- rd("cbpp"); cbpp2 <- if (file.exists("data/cbpp2.csv")) rd("cbpp2"); sleepstudy <- rd("sleepstudy"); Contraception <- rd("Contraception"); grouseticks <- rd("grouseticks")
gc1 <- glmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 1e5, rhoend = 1e-8), tolPwrss = 1e-13, check.conv.grad = "ignore", check.conv.hess = "ignore")
lc1 <- lmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 1e5, rhoend = 1e-10), check.conv.singular = "ignore")
q <- function(e) suppressMessages(suppressWarnings(e))
tab <- function(a) list(rows = I(rownames(a)), columns = I(colnames(a)), values = unname(as.matrix(as.data.frame(lapply(as.data.frame(a), as.numeric)))), heading = I(as.character(attr(a, "heading"))))
save1 <- function(id, x) { wj(c(list(id = id, software = versions("lmerTest", "pbkrtest", "minqa")), x), paste0("inference/", id, ".json")); cat(format(Sys.time(), "%H:%M:%S"), id, "\n") }
prof <- function(m, id, formula, dataset, ...) { t <- system.time(p <- q(profile(m, signames = FALSE, ...)))[["elapsed"]]
  df <- as.data.frame(p); ci <- q(confint(p)); ci90 <- q(confint(p, level = .9)); w <- q(confint(m, method = "Wald"))
  save1(id, list(dataset = dataset, formula = formula, notes = "random-effect parameters on the sd (and correlation) scale, named by lme4 with signames = FALSE; .zeta is the signed root of the profiled deviance difference; Wald intervals are only defined for fixed effects",
    estimates = list(fixef = nv(fixef(m)), theta = I(unname(getME(m, "theta"))), sigma = sigma(m), minus2logLik = -2 * as.numeric(logLik(m))),
    profile_ci_95 = tab(ci), profile_ci_90 = tab(ci90), wald_ci_95 = tab(w), elapsed_s = t,
    profile_points = lapply(split(df, df$.par), function(x) list(focal = I(x$.focal), zeta = I(x$.zeta),
       all = I(unname(as.matrix(x[, setdiff(names(x), c(".zeta", ".par", ".focal"))]))), all_names = I(setdiff(names(x), c(".zeta", ".par", ".focal"))))))) }

## sleepstudy (ML fits, as profiling requires)
s1 <- q(lmer(Reaction ~ Days + (Days | Subject), sleepstudy, REML = FALSE, control = lc1)); prof(s1, "profile_sleep", "Reaction ~ Days + (Days | Subject)", "sleepstudy")
s0 <- q(lmer(Reaction ~ Days + (1 | Subject), sleepstudy, REML = FALSE, control = lc1)); prof(s0, "profile_sleep_int", "Reaction ~ Days + (1 | Subject)", "sleepstudy")
s2 <- q(lmer(Reaction ~ Days + (Days || Subject), sleepstudy, REML = FALSE, control = lc1)); n0 <- q(lmer(Reaction ~ 1 + (Days | Subject), sleepstudy, REML = FALSE, control = lc1))
save1("anova_sleep", list(dataset = "sleepstudy", models = I(c("n0: Reaction ~ 1 + (Days | Subject)", "s0: Reaction ~ Days + (1 | Subject)", "s2: Reaction ~ Days + (Days || Subject)", "s1: Reaction ~ Days + (Days | Subject)")),
   anova_s0_s2_s1 = tab(anova(s0, s2, s1)), anova_n0_s1 = tab(anova(n0, s1)), drop1_s1 = tab(drop1(s1, test = "Chisq"))))
lt <- lmerTest::lmer(Reaction ~ Days + (Days | Subject), sleepstudy, control = lc1); lt3 <- lmerTest::lmer(Reaction ~ factor(Days3) + (1 | Subject), sleepstudy, control = lc1)
save1("lmertest_sleep", list(dataset = "sleepstudy", formula = "Reaction ~ Days + (Days | Subject), REML", summary_satterthwaite = tab(coef(summary(lt))), anova_satterthwaite = tab(anova(lt)),
   anova_kenward_roger = tab(anova(lt, ddf = "Kenward-Roger")), summary_kenward_roger = tab(coef(summary(lt, ddf = "Kenward-Roger"))), vcov_adj_kenward_roger = mat(as.matrix(vcovAdj(lt))),
   second_formula = "Reaction ~ factor(Days3) + (1 | Subject), REML", second_anova_satterthwaite = tab(anova(lt3)), second_summary_satterthwaite = tab(coef(summary(lt3))), second_anova_kenward_roger = tab(anova(lt3, ddf = "Kenward-Roger")), ranova = tab(ranova(lt))))
## predictions: sleepstudy
nd <- data.frame(Days = c(0, 3.5, 12, 4), Subject = c("308", "335", "999", "372"))
r <- q(lmer(Reaction ~ Days + (Days | Subject), sleepstudy, control = lc1))
save1("predict_sleep", list(dataset = "sleepstudy", formula = "Reaction ~ Days + (Days | Subject), REML", newdata = nd, notes = "subject 999 is a new level (allow.new.levels = TRUE: its random effects are 0)",
   re_form_NA = I(unname(predict(r, nd, re.form = NA, allow.new.levels = TRUE))), re_form_NULL = I(unname(predict(r, nd, allow.new.levels = TRUE))),
   re_form_intercept_only = I(unname(predict(r, nd, re.form = ~ (1 | Subject), allow.new.levels = TRUE)))))

## cbpp
g1 <- q(glmer(cbind(incidence, size - incidence) ~ period + (1 | herd), cbpp, binomial, control = gc1)); prof(g1, "profile_cbpp", "cbind(incidence, size - incidence) ~ period + (1 | herd)", "cbpp")
g0 <- q(update(g1, . ~ . - period))
go <- q(glmer(cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs), cbpp, binomial, control = gc1))
save1("anova_cbpp", list(dataset = "cbpp", anova_null_full = tab(anova(g0, g1)), drop1 = tab(q(drop1(g1, test = "Chisq"))), anova_with_obs = tab(anova(g1, go)), summary_coef = tab(coef(summary(g1)))))
nd <- data.frame(period = c("1", "2", "4", "3"), herd = c("1", "7", "99", "15"))
pr <- function(m, nd, ...) list(link = I(unname(predict(m, nd, type = "link", allow.new.levels = TRUE, ...))), response = I(unname(predict(m, nd, type = "response", allow.new.levels = TRUE, ...))))
save1("predict_cbpp", list(dataset = "cbpp", formula = deparse(formula(g1)), newdata = nd, notes = "herd 99 is a new level", re_form_NA = pr(g1, nd, re.form = NA), re_form_NULL = pr(g1, nd)))
nd2 <- transform(nd, obs = c("1", "2", "3", "99")); save1("predict_cbpp_obs", list(dataset = "cbpp", formula = "cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)", newdata = nd2, re_form_NA = pr(go, nd2, re.form = NA), re_form_NULL = pr(go, nd2), re_form_herd = pr(go, nd2, re.form = ~ (1 | herd))))
mom <- function(m, nsim = 4000, ...) { S <- simulate(m, nsim = nsim, seed = 42, ...); Y <- sapply(S, function(y) if (is.matrix(y)) y[, 1] else as.numeric(y))
  if (is.factor(S[[1]])) Y <- Y - 1
  list(nsim = nsim, mean_first20 = I(rowMeans(Y)[1:20]), sd_first20 = I(apply(Y, 1, sd)[1:20]), mean_of_total = mean(colSums(Y)), sd_of_total = sd(colSums(Y)), mcse_note = "Monte-Carlo: standard error of each mean is sd/sqrt(nsim)") }
save1("simulate_moments", list(notes = "Monte-Carlo moments of simulate(); use.u = FALSE draws new random effects, use.u = TRUE conditions on the modes. cbpp: counts of the first response column.",
   cbpp_new_u = mom(g1), cbpp_use_u = mom(g1, use.u = TRUE), sleep_new_u = mom(r), sleep_use_u = mom(r, use.u = TRUE)))
## cbpp2
if (!is.null(cbpp2)) { b1 <- q(glmer(incidence/size ~ period + treatment + avg_size + (1 | herd), cbpp2, binomial, weights = size, control = gc1)); b2 <- q(update(b1, . ~ . + (1 | obs))); b3 <- q(update(b1, . ~ . - (1 | herd) + (1 | obs)))
save1("anova_cbpp2", list(dataset = "cbpp2", notes = "gm2 has zero herd variance", drop1_gm2 = tab(q(drop1(b2, scope = ~ treatment + avg_size, test = "Chisq"))), drop1_gm1 = tab(q(drop1(b1, scope = ~ treatment + avg_size, test = "Chisq"))), anova_gm1_gm2 = tab(anova(b1, b2)), anova_gm3_gm2 = tab(anova(b3, b2)),
   corr_fixef_gm1 = mat(cov2cor(as.matrix(vcov(b1)))), summary_gm1 = tab(coef(summary(b1))), scaled_residual_quantiles_gm1 = I(unname(quantile(residuals(b1, "pearson")))))) }
## Contraception
C <- function(f, k) q(glmer(as.formula(f), Contraception, binomial, nAGQ = k, control = gc1)); f3 <- "use ~ age * ch + I(age^2) + urban + "
cm1 <- C("use ~ age + I(age^2) + urban + livch + (1 | district)", 0L); cm2 <- C("use ~ age + I(age^2) + urban + ch + (1 | district)", 0L); cm3 <- C(paste0(f3, "(1 | district)"), 1L)
cm4 <- C(paste0(f3, "(urban | district)"), 1L); cm5 <- C(paste0(f3, "(1 | urban:district) + (1 | district)"), 1L); cm6 <- C(paste0(f3, "(1 | urban:district)"), 1L)
save1("anova_contra", list(dataset = "Contraception", anova_cm1_to_cm6 = tab(anova(cm1, cm2, cm3, cm4, cm5, cm6)), drop1_cm3 = tab(q(drop1(cm3, test = "Chisq"))), summary_cm3 = tab(coef(summary(cm3))), scaled_residual_quantiles_cm3 = I(unname(quantile(residuals(cm3, "pearson"))))))
nd <- data.frame(age = c(-10, 0, 5, 15), ch = c("N", "Y", "Y", "N"), urban = c("N", "Y", "N", "Y"), district = c("1", "35", "61", "999"))
save1("predict_contra_cm3", list(dataset = "Contraception", newdata = nd, re_form_NA = pr(cm3, nd, re.form = NA), re_form_NULL = pr(cm3, nd), cm4_re_form_NULL = pr(cm4, nd)))
prof(cm3, "profile_contra_cm3", paste0(f3, "(1 | district)"), "Contraception")
