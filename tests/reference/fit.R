# Generates data/ and models/ (run in this folder: Rscript fit.R [regex of model ids]).
source("lib.R")
suppressPackageStartupMessages({ library(mlmRev); library(nlme); library(glmmTMB) })
args <- commandArgs(TRUE); PAT <- if (length(args)) args[1] else "."
want <- function(id) grepl(PAT, id)
G <- function(id, ...) if (want(id)) try(fit_mer(id, ...))
T <- function(id, ...) if (want(id)) try(fit_tmb(id, ...))

## ------------------------------------------------------------------ data
cbpp$obs <- factor(seq_len(nrow(cbpp))); cbpp$prop <- cbpp$incidence / cbpp$size
save_data("cbpp", cbpp, "lme4", notes = "obs (row number as factor) and prop = incidence/size added")
if (file.exists("data/cbpp2.csv")) { d <- read.csv("data/cbpp2.csv")
d <- transform(d[, c("herd", "treatment", "avg_size", "period", "size", "incidence")], herd = factor(herd), period = factor(period),
               treatment = factor(treatment, levels = c("Partial/null", "Complete", "Unknown")))
d$obs <- factor(seq_len(nrow(d)))
save_data("cbpp2", d, "lme4", item = "cbpp2 (vignette_data of later lme4 versions)",
          notes = "not in lme4 1.1-31; from the lme4 source repository, inst/vignette_data/cbpp2.csv; the row and herd order differs from cbpp; obs added") }
Contraception$ch <- factor(ifelse(Contraception$livch == "0", "N", "Y"))
save_data("Contraception", Contraception, "mlmRev", notes = "ch = livch != 0 added")
toy <- data.frame(x1 = rep(1:5, 3), subject = factor(sort(rep(1:3, 5))), y = c(1,1,1,1,1,0,0,0,1,1,0,1,0,1,1))
save_data("toy15", toy, "none", item = "15 binary answers in three groups (toy data)", licence = "none")
grouseticks <- lme4::grouseticks
save_data("grouseticks", grouseticks, "lme4")
save_data("VerbAgg", VerbAgg, "lme4")
data(toenail, package = "HSAUR3"); save_data("toenail", toenail, "HSAUR3", licence = "GPL-2")
Arabidopsis <- within(lme4::Arabidopsis, { gen <- factor(gen); rack <- factor(rack); nutrient <- factor(nutrient); obs <- factor(seq_along(total.fruits)) })
save_data("Arabidopsis", Arabidopsis, "lme4", notes = "gen, rack, nutrient as factors; obs added")
ss <- sleepstudy
set.seed(101); ss$w <- round(rgamma(nrow(ss), 4, 4), 3) + 0.05; ss$off <- round(3 * ss$Days + rnorm(nrow(ss)), 3)
ss$fDays <- factor(ss$Days); ss$Days3 <- factor(pmin(ss$Days %/% 4, 2))
save_data("sleepstudy", ss, "lme4", notes = "w (simulated prior weights), off (simulated offset), fDays, Days3 = min(Days %/% 4, 2) added")
save_data("Penicillin", Penicillin, "lme4"); save_data("Pastes", Pastes, "lme4")
save_data("Dyestuff", Dyestuff, "lme4"); save_data("Dyestuff2", Dyestuff2, "lme4"); save_data("cake", cake, "lme4")
save_data("InstEval", InstEval, "lme4", gz = TRUE)
if (file.exists("data/classroom.csv")) { d <- read.csv("data/classroom.csv"); d$classid <- factor(d$classid); d$schoolid <- factor(d$schoolid)
save_data("classroom", d, "WWGbook", item = "classroom",
  source = "a public copy of WWGbook::classroom", licence = "GPL (>= 2), as WWGbook") }
save_data("Early", mlmRev::Early, "mlmRev"); ox <- as.data.frame(mlmRev::Oxboys); save_data("Oxboys", ox, "mlmRev")
save_data("Chem97", mlmRev::Chem97[, c("lea","school","score","gender","age","gcsescore","gcsecnt")], "mlmRev", gz = TRUE, notes = "student column dropped")
od <- as.data.frame(nlme::Orthodont); od$Subject <- factor(as.character(od$Subject), levels = levels(od$Subject)); save_data("Orthodont", od, "nlme")
sal <- glmmTMB::Salamanders; sal$fsample <- factor(sal$sample); sal$site <- factor(as.character(sal$site), levels = levels(sal$site))
save_data("Salamanders", sal, "glmmTMB", licence = "AGPL-3", notes = "site as unordered factor; fsample = factor(sample) added")
owls <- glmmTMB::Owls; owls$cArrival <- owls$ArrivalTime - 24; save_data("Owls", owls, "glmmTMB", licence = "AGPL-3", notes = "cArrival = ArrivalTime - 24 added")
pt <- MASS::petrol; pt$prop <- pt$Y / 100; pt$EP10 <- pt$EP / 100; save_data("petrol", pt, "MASS", licence = "GPL-2 | GPL-3", notes = "prop = Y/100 and EP10 = EP/100 added")
data_readme()

## ------------------------------------------------------------------ binomial: cbpp
cb <- "cbind(incidence, size - incidence) ~ period + (1 | herd)"
for (k in c(0L, 1L, 2L, 5L, 9L, 25L)) G(paste0("cbpp_nagq", k), "cbpp", cb, "binomial()", nAGQ = k)
G("cbpp_prop_weights", "cbpp", "prop ~ period + (1 | herd)", "binomial()", weights = "size")
G("cbpp_herd_obs", "cbpp", "cbind(incidence, size - incidence) ~ period + (1 | herd) + (1 | obs)", "binomial()")
G("cbpp_obs_only", "cbpp", "cbind(incidence, size - incidence) ~ period + (1 | obs)", "binomial()")
for (l in c("probit", "cloglog", "cauchit", "log")) {
  G(paste0("cbpp_", l), "cbpp", cb, sprintf("binomial('%s')", l), notes = "non-canonical link: lme4's Laplace uses the expected (Fisher) weights in the determinant, glmmTMB's the observed Hessian")
  G(paste0("cbpp_", l, "_nagq9"), "cbpp", cb, sprintf("binomial('%s')", l), nAGQ = 9L)
  T(paste0("cbpp_", l, "_tmb"), "cbpp", cb, sprintf("binomial('%s')", l))
}
T("cbpp_logit_tmb", "cbpp", cb, "binomial()")
T("cbpp_betabinomial_tmb", "cbpp", cb, "betabinomial()")
T("cbpp_betabinomial_nore_tmb", "cbpp", "cbind(incidence, size - incidence) ~ period", "betabinomial()")
p2 <- "incidence/size ~ period + treatment + avg_size"
G("cbpp2_gm1", "cbpp2", paste(p2, "+ (1 | herd)"), "binomial()", weights = "size")
G("cbpp2_gm2", "cbpp2", paste(p2, "+ (1 | herd) + (1 | obs)"), "binomial()", weights = "size")
G("cbpp2_gm3", "cbpp2", paste(p2, "+ (1 | obs)"), "binomial()", weights = "size")

## ------------------------------------------------------------------ binomial: toy, Contraception, VerbAgg, toenail
for (k in c(0L, 1L, 9L, 10L, 25L)) G(paste0("toy15_nagq", k), "toy15", "y ~ x1 + (1 | subject)", "binomial()", nAGQ = k)
C <- "Contraception"
G("contra_cm1_nagq0", C, "use ~ age + I(age^2) + urban + livch + (1 | district)", "binomial()", nAGQ = 0L)
G("contra_cm2_nagq0", C, "use ~ age + I(age^2) + urban + ch + (1 | district)", "binomial()", nAGQ = 0L)
G("contra_cm1", C, "use ~ age + I(age^2) + urban + livch + (1 | district)", "binomial()")
G("contra_cm2", C, "use ~ age + I(age^2) + urban + ch + (1 | district)", "binomial()")
f3 <- "use ~ age * ch + I(age^2) + urban + "
G("contra_cm3", C, paste0(f3, "(1 | district)"), "binomial()")
for (k in c(0L, 9L, 25L)) G(paste0("contra_cm3_nagq", k), C, paste0(f3, "(1 | district)"), "binomial()", nAGQ = k)
G("contra_cm4", C, paste0(f3, "(urban | district)"), "binomial()")
G("contra_cm4_nagq0", C, paste0(f3, "(urban | district)"), "binomial()", nAGQ = 0L)
G("contra_cm5", C, paste0(f3, "(1 | urban:district) + (1 | district)"), "binomial()")
G("contra_cm6", C, paste0(f3, "(1 | urban:district)"), "binomial()")
G("contra_cm3_probit", C, paste0(f3, "(1 | district)"), "binomial('probit')")
G("contra_cm4_cloglog", C, paste0(f3, "(urban | district)"), "binomial('cloglog')")
G("contra_age_uncorr", C, "use ~ age + ch + urban + (age || district)", "binomial()")
T("contra_cm4_tmb", C, paste0(f3, "(urban | district)"), "binomial()")
V <- "r2 ~ (Anger + Gender + btype + situ)^2 + (1 | id) + (1 | item)"
for (k in 0:1) G(paste0("verbagg_nagq", k), "VerbAgg", V, "binomial()", nAGQ = k)
G("verbagg_slopes_nagq0", "VerbAgg", "r2 ~ Anger + Gender + btype + situ + mode + (mode | id) + (1 | item)", "binomial()", nAGQ = 0L)
G("verbagg_slopes", "VerbAgg", "r2 ~ Anger + Gender + btype + situ + mode + (mode | id) + (1 | item)", "binomial()")
for (k in c(0L, 1L, 5L, 20L, 25L)) G(paste0("toenail_nagq", k), "toenail", "outcome ~ time * treatment + (1 | patientID)", "binomial()", nAGQ = k,
  notes = "strong within-patient correlation: the Laplace and low-order AGQ approximations are poor here and may have several local optima")

## ------------------------------------------------------------------ Poisson, NB
G("grouse_full", "grouseticks", "TICKS ~ YEAR + cHEIGHT + (1 | BROOD) + (1 | INDEX) + (1 | LOCATION)", "poisson()")
G("grouse_full_rawheight", "grouseticks", "TICKS ~ YEAR + HEIGHT + (1 | BROOD) + (1 | INDEX) + (1 | LOCATION)", "poisson()", notes = "badly scaled HEIGHT")
G("grouse_full_nagq0", "grouseticks", "TICKS ~ YEAR + cHEIGHT + (1 | BROOD) + (1 | INDEX) + (1 | LOCATION)", "poisson()", nAGQ = 0L)
for (k in c(1L, 9L, 25L)) G(paste0("grouse_brood_nagq", k), "grouseticks", "TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", "poisson()", nAGQ = k)
G("grouse_sqrt", "grouseticks", "TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", "poisson('sqrt')")
G("owls_identity", "Owls", "SiblingNegotiation ~ FoodTreatment + SexParent + (1 | Nest)", "poisson('identity')")
T("owls_identity_tmb", "Owls", "SiblingNegotiation ~ FoodTreatment + SexParent + (1 | Nest)", "poisson('identity')")
fo <- "SiblingNegotiation ~ FoodTreatment * SexParent + cArrival * SexParent + offset(logBroodSize) + (1 | Nest)"
G("owls_pois_offset", "Owls", fo, "poisson()")
G("owls_pois_offset_arg", "Owls", "SiblingNegotiation ~ FoodTreatment * SexParent + (1 | Nest)", "poisson()", offset = "logBroodSize")
G("owls_pois_weights", "Owls", "SiblingNegotiation ~ FoodTreatment * SexParent + (1 | Nest)", "poisson()", weights = "BroodSize", notes = "BroodSize used as prior weights")
A <- "Arabidopsis"; fa <- "total.fruits ~ nutrient * amd + rack + status + (1 | popu) + (1 | gen)"
G("arab_pois", A, fa, "poisson()")
G("arab_pois_olre", A, paste(fa, "+ (1 | obs)"), "poisson()")
G("arab_pois_slopes", A, "total.fruits ~ nutrient * amd + rack + status + (1 | popu) + (nutrient | gen)", "poisson()")
if (want("arab_nb_glmer")) try(fit_glmer_nb("arab_nb_glmer", A, fa))
T("arab_nb2_tmb", A, fa, "nbinom2()"); T("arab_nb1_tmb", A, fa, "nbinom1()"); T("arab_pois_tmb", A, fa, "poisson()")

## ------------------------------------------------------------------ Gamma, inverse Gaussian
gq <- "lme4 profiles the dispersion as deviance/n (not ML) and the random-effects penalty is not divided by it in the criterion; see the README on scale-parameter families"
fs <- "Reaction ~ Days + (1 | Subject)"
G("sleep_gamma_log", "sleepstudy", fs, "Gamma('log')", notes = gq); T("sleep_gamma_log_tmb", "sleepstudy", fs, "Gamma('log')")
G("sleep_gamma_inverse", "sleepstudy", fs, "Gamma('inverse')", notes = gq)
G("sleep_gamma_identity", "sleepstudy", fs, "Gamma('identity')", notes = gq)
G("sleep_gamma_log_nagq0", "sleepstudy", fs, "Gamma('log')", nAGQ = 0L, notes = gq)
G("sleep_invgauss_log", "sleepstudy", fs, "inverse.gaussian('log')", notes = gq)
G("cake_gamma_log", "cake", "angle ~ recipe + temp + (1 | replicate:recipe)", "Gamma('log')", notes = gq)
T("cake_gamma_log_tmb", "cake", "angle ~ recipe + temp + (1 | replicate:recipe)", "Gamma('log')")

## ------------------------------------------------------------------ LMM
S <- "sleepstudy"; fd <- "Reaction ~ Days + (Days | Subject)"
G("sleep_reml", S, fd); G("sleep_ml", S, fd, REML = FALSE)
G("sleep_uncorr_reml", S, "Reaction ~ Days + (Days || Subject)"); G("sleep_uncorr_ml", S, "Reaction ~ Days + (Days || Subject)", REML = FALSE)
G("sleep_int_reml", S, fs); G("sleep_int_ml", S, fs, REML = FALSE)
G("sleep_weights_reml", S, fd, weights = "w"); G("sleep_weights_ml", S, fd, weights = "w", REML = FALSE)
G("sleep_offset_ml", S, fd, offset = "off", REML = FALSE)
G("sleep_factor_re_ml", S, "Reaction ~ Days + (0 + Days3 | Subject)", REML = FALSE)
for (R in c(TRUE, FALSE)) { s <- if (R) "reml" else "ml"
  G(paste0("penicillin_", s), "Penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)", REML = R)
  G(paste0("pastes_", s), "Pastes", "strength ~ 1 + (1 | batch) + (1 | sample)", REML = R)
  G(paste0("pastes_nested_", s), "Pastes", "strength ~ 1 + (1 | batch/cask)", REML = R)
  G(paste0("dyestuff_", s), "Dyestuff", "Yield ~ 1 + (1 | Batch)", REML = R)
  G(paste0("dyestuff2_", s), "Dyestuff2", "Yield ~ 1 + (1 | Batch)", REML = R, notes = "singular")
  G(paste0("classroom_", s), "classroom", "mathgain ~ mathkind + minority + ses + (1 | classid) + (1 | schoolid)", REML = R)
  G(paste0("cake_", s), "cake", "angle ~ recipe * temperature + (1 | recipe:replicate)", REML = R)
  G(paste0("early_", s), "Early", "cog ~ I(age - 1) * trt + (I(age - 1) | id)", REML = R, notes = "near singular / singular correlation")
  G(paste0("oxboys_", s), "Oxboys", "height ~ age + I(age^2) + (age + I(age^2) | Subject)", REML = R)
  G(paste0("orthodont_", s), "Orthodont", "distance ~ age * Sex + (age | Subject)", REML = R)
}
G("chem97_reml", "Chem97", "score ~ gcsecnt + gender + (1 | school) + (1 | lea)")
G("chem97_slopes_ml", "Chem97", "score ~ gcsecnt + gender + (gcsecnt | school) + (1 | lea)", REML = FALSE)
G("insteval_ml", "InstEval", "y ~ service + (1 | s) + (1 | d) + (1 | dept:service)", REML = FALSE)
write_index()

## ------------------------------------------------------------------ glmmTMB
T("sleep_us_tmb", S, fd); T("sleep_us_reml_tmb", S, fd, REML = TRUE)
T("sleep_diag_tmb", S, "Reaction ~ Days + diag(Days | Subject)")
T("sleep_cs_tmb", S, "Reaction ~ Days + cs(0 + Days3 | Subject)")
T("sleep_ar1_tmb", S, "Reaction ~ Days + ar1(0 + fDays | Subject)", dispformula = "~0", notes = "no residual term (dispformula = ~0: glmmTMB fixes the residual variance at sqrt(machine epsilon)); with a free residual variance the estimate is on that boundary")
T("sleep_disp_tmb", S, fs, dispformula = "~Days")
W <- "Salamanders"
T("sal_pois_tmb", W, "count ~ mined + spp + (1 | site)", "poisson()")
T("sal_nb1_tmb", W, "count ~ mined + spp + (1 | site)", "nbinom1()"); T("sal_nb2_tmb", W, "count ~ mined + spp + (1 | site)", "nbinom2()")
T("sal_zip_tmb", W, "count ~ spp + mined + (1 | site)", "poisson()", ziformula = "~spp + mined")
T("sal_zip_const_tmb", W, "count ~ mined + (1 | site)", "poisson()", ziformula = "~1")
T("sal_zinb2_tmb", W, "count ~ spp + mined + (1 | site)", "nbinom2()", ziformula = "~mined")
T("sal_hurdle_pois_tmb", W, "count ~ spp + mined + (1 | site)", "truncated_poisson()", ziformula = "~spp + mined")
T("sal_hurdle_nb2_tmb", W, "count ~ spp + mined + (1 | site)", "truncated_nbinom2()", ziformula = "~mined")
T("sal_ar1_tmb", W, "count ~ mined + ar1(0 + fsample | site)", "poisson()")
T("sal_cs_tmb", W, "count ~ mined + cs(0 + fsample | site)", "poisson()")
T("sal_diag_tmb", W, "count ~ mined + diag(mined | site)", "poisson()")
T("sal_us_tmb", W, "count ~ mined + (cover | site)", "poisson()")
T("owls_pois_tmb", "Owls", fo, "poisson()")
T("owls_zip_tmb", "Owls", fo, "poisson()", ziformula = "~1"); T("owls_zinb1_tmb", "Owls", fo, "nbinom1()", ziformula = "~1")
T("owls_zinb2_tmb", "Owls", fo, "nbinom2()", ziformula = "~1"); T("owls_nb2_tmb", "Owls", fo, "nbinom2()")
T("petrol_beta_tmb", "petrol", "prop ~ EP10 + (1 | No)", "beta_family()")
write_index()
