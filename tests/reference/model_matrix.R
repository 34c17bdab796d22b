# Frozen results of R for tests/formula/test_parse.py and test_frame.py: terms, update, deparse; model matrices,
# transforms on new data, random-effects terms.
# Run in this folder: Rscript model_matrix.R   (needs lme4, splines, jsonlite); writes model_matrix.json
suppressMessages({library(lme4); library(splines); library(jsonlite)})
set.seed(20240607)
RNGkind(sample.kind = "Rejection")
n <- 36
d <- data.frame(
  y = round(rnorm(n), 3),
  x = round(runif(n, -2, 5), 2),
  w = round(rexp(n) + 0.1, 2),
  k = rep(1:9, 4),                                  # integer
  a = factor(rep(c("a1", "a2", "a3"), length.out = n)),
  b = factor(rep(c("lo", "hi"), each = 3, length.out = n), levels = c("lo", "hi")),
  c = factor(sample(c("u", "v", "w", "z"), n, TRUE)),
  o = factor(sample(c("low", "mid", "high"), n, TRUE), levels = c("low", "mid", "high"), ordered = TRUE),
  o5 = factor(rep(1:5, length.out = n), ordered = TRUE),
  l = sample(c(TRUE, FALSE), n, TRUE),
  s = sample(c("red", "green", "blue"), n, TRUE),   # text
  g = factor(rep(1:6, each = 6)),
  h = factor(rep(1:3, 12)),
  i = factor(rep(1:12, each = 3)),
  stringsAsFactors = FALSE)
names(d)[names(d) == "w"] <- "my w"
d$total.n <- sample(3:9, n, TRUE)
d$s1 <- sapply(d$total.n, function(m) sample(0:m, 1))

new <- d[c(2, 5, 11, 17, 30), ]
new$x <- c(-4, -1, 0.5, 4.9, 9)                     # beyond the range of the data on both sides
new$y <- NULL

fixed <- c(
  "~ 1", "~ 0", "~ x", "~ 0 + x", "~ x - 1", "~ a", "~ 0 + a", "~ -1 + a + b", "~ 0 + a + b", "~ a + b - 1", "~ a:b", "~ 0 + a:b",
  "~ x:a", "~ a:x", "~ 0 + x:a", "~ x + x:a", "~ a + a:x", "~ a*b", "~ a*b*c", "~ a/b", "~ a/x", "~ a/b/x", "~ a %in% b",
  "~ b + a %in% b", "~ (a + b + c)^2", "~ (a + b + c)^2 - a:b", "~ (a + b + x)^3 - a:b:x", "~ a*x - a", "~ a*b - a", "~ a*b - a - b",
  "~ b:a + a", "~ b - b + a:b", "~ x + b:a", "~ 0 + x + b:a", "~ 0 + b:a + c", "~ 0 + x:a + b", "~ a:b:c - 1", "~ a + b:c", "~ a:b + a:c",
  "~ a + a:b + a:b:x", "~ a*b + c - 1", "~ poly(x, 2)", "~ poly(x, 3):a", "~ poly(x, 2)*a", "~ a:poly(x, 2) - 1",
  "~ poly(x, 2, raw = TRUE)", "~ poly(x, degree = 4)", "~ poly(x, 1)", "~ o", "~ 0 + o", "~ o5", "~ o*a", "~ o:x", "~ a:o",
  "~ l", "~ 0 + l", "~ l:x", "~ l*a", "~ a*l - 1", "~ s", "~ s*l", "~ 0 + s:x", "~ I(x^2)", "~ x + I(x^2) + I(x^3)", "~ I(x/2) + I(-x) + I(x*k)",
  "~ log(k) + sqrt(k) + exp(x) + log(k, 2) + log(k, base = 10)", "~ log(k + 1):b", "~ `my w`", "~ `my w`*a", "~ log(`my w`) + I(`my w`^2)",
  "~ factor(k)", "~ factor(k > 4)", "~ I(x > 1)", "~ (x > 1)", "~ a + I(x > 1):b", "~ k %% 3 + k %/% 2", "~ as.numeric(a) + as.numeric(l)",
  "~ scale(x)", "~ scale(x, scale = FALSE)", "~ scale(x, center = FALSE)", "~ scale(x, 1, 2)", "~ scale(x):a", "~ bs(x)", "~ bs(x, df = 5)", "~ bs(x, 4)",
  "~ bs(x, knots = c(0, 2))", "~ bs(x, df = 4, degree = 2)", "~ bs(x, df = 6, intercept = TRUE)",
  "~ bs(x, df = 5, Boundary.knots = c(-3, 6))", "~ bs(x, degree = 1)", "~ ns(x)", "~ ns(x, 2)", "~ ns(x, df = 4)", "~ ns(x, knots = c(0, 1, 3))",
  "~ ns(x, df = 4, intercept = TRUE)", "~ ns(x, df = 3, Boundary.knots = c(-1, 4))", "~ ns(x, df = 3)*b",
  "~ relevel(a, ref = 'a2')", "~ factor(s, levels = c('red', 'blue', 'green'))", "~ factor(h, labels = c('A', 'B', 'C'))",
  "~ C(a, sum)", "~ C(a, helmert) + b", "~ C(a, contr.SAS)", "~ C(o, treatment)", "~ C(a, treatment, base = 2)", "~ C(c, poly)", "~ ordered(h)",
  "~ cut(x, c(-3, 0, 2, 6))", "~ cut(x, 3)", "~ cut(k, c(0, 3, 9), labels = c('few', 'many'))", "~ cut(x, c(-3, 0, 6), right = FALSE)",
  "~ pmin(x, 1) + pmax(x, 0, k)", "~ round(x) + floor(x) + ceiling(x) + abs(x)", "~ ifelse(x > 1, x, 0)", "~ a*b + a:b:c", "~ a + b %in% a + x",
  "~ (a + x) %in% b", "~ a*b %in% c", "~ interaction(a, b)", "~ x + a + offset(k) + b", "~ (a + b)/x", "~ a/(b + x)", "~ a + (b + x - 1)", "~ a:a + b^2",
  "~ poly(x, `my w`, degree = 2)", "~ poly(x, `my w`, k, degree = 2)", "~ poly(x, `my w`, degree = 2, raw = TRUE)", "~ poly(x, 2, raw = 1)", "~ poly(degree = 3, x)",
  "~ pmax(x, 0, na.rm = TRUE) + pmin(x, k)", "~ relevel(c, ref = 2)", "~ relevel(ref = 'v', c)", "~ cut(x, 3, dig.lab = 2)",
  "~ cut(x, c(-3, 0, 2, 6), c('p', 'q', 'p'))", "~ cut(x, c(-3, 0, 2, 6), FALSE)", "~ cut(x, c(-3, 0, 2, 6), ordered_result = TRUE)",
  "~ cut(k, c(1, 4, 9), NULL, TRUE)", "~ cut(k, c(1, 4, 9), include.lowest = TRUE, right = FALSE)", "~ cut(x * 1e5, 3)",
  "~ ns(x, 3, c(0, 1))", "~ ns(x, 3, NULL, TRUE)", "~ bs(x, 5, NULL, 2, TRUE)", "~ bs(x, 5, c(0, 1), 3, FALSE, c(-4, 7))", "~ scale(x, FALSE, TRUE)",
  "~ scale(x, scale = 3, center = 2)", "~ factor(c, c('z', 'w', 'v', 'u'), c('p', 'q', 'p', 'r'))",
  "~ factor(h, c(3, 2, 1), c('p', 'q', 'r'), NA, TRUE)", "~ ordered(h, c(3, 1, 2))", "~ factor(o, ordered = FALSE)",
  "~ round(x, 1) + round(x * 10, -1) + round(digits = 2, x * 1.005)", "~ log(base = 2, x = k) + log(k, k + 1)", "~ ifelse(x > 1, 'u', 'v')",
  "~ ifelse(x > 1, s, 'other')", "~ ifelse(x > 1, l, FALSE)", "~ ifelse(test = l, no = 2, yes = x)", "~ interaction(a, b, sep = '_', lex.order = TRUE)",
  "~ interaction(a, b, drop = TRUE)", "~ C(c, c(3, -1, -1, -1))", "~ C(c, c(1, 2, 3, 5))", "~ C(contr = sum, object = a)", "~ C(o, treatment, base = 3)",
  "~ x - a", "~ a + x - (x + b)")

num <- function(v) unname(as.numeric(v))
one <- function(f, contrasts = NULL) {
  # the plain evaluation of model.frame, as lmer does
  fo <- as.formula(f)
  mf <- model.frame(fo, d, drop.unused.levels = TRUE)
  X <- model.matrix(fo, mf, contrasts.arg = contrasts)
  out <- list(formula = paste("y", f), names = I(as.character(colnames(X))), assign = I(attr(X, "assign")),
              labels = I(attr(terms(mf), "term.labels")), X = lapply(seq_len(ncol(X)), function(j) num(X[, j])))
  Xn <- tryCatch({
    mn <- suppressWarnings(model.frame(terms(mf), new, na.action = na.pass, xlev = .getXlevels(terms(mf), mf)))
    suppressWarnings(model.matrix(terms(mf), mn, contrasts.arg = attr(X, "contrasts")))  # as predict.lm
  }, error = function(e) NULL)
  if (!is.null(Xn)) out$new <- lapply(seq_len(ncol(Xn)), function(j) num(Xn[, j]))
  out
}
res <- lapply(fixed, one)

cm <- matrix(c(1, -1, 0, 0.5, 0.5, -1), 3, dimnames = list(levels(d$a), c("first", "rest")))
contr <- list(
  list(f = "~ a*b", spec = list(a = "contr.sum", b = "contr.sum")), list(f = "~ a + b", spec = list(a = "contr.helmert")),
  list(f = "~ c*x", spec = list(c = "contr.helmert")), list(f = "~ c", spec = list(c = "contr.poly")), list(f = "~ c:b", spec = list(c = "contr.SAS")),
  list(f = "~ 0 + a + c", spec = list(a = "contr.sum", c = "contr.sum")), list(f = "~ o", spec = list(o = "contr.treatment")),
  list(f = "~ o5*a", spec = list(o5 = "contr.sum")), list(f = "~ a*x", spec = list(a = cm)), list(f = "~ a", spec = list(a = unname(cm))),
  list(f = "~ c", spec = list(c = matrix(c(3, -1, -1, -1), 4))), list(f = "~ s", spec = list(s = "contr.sum")),
  list(f = "~ l", spec = list(l = "contr.sum")))
resc <- lapply(contr, function(k) {
  r <- one(k$f, k$spec)
  r$contrasts <- lapply(k$spec, function(s) if (is.character(s)) unbox(s) else
    list(matrix = lapply(seq_len(nrow(s)), function(j) num(s[j, ])), columns = colnames(s)))
  r
})

mixed <- c(
  "(1 | g)", "(x | g)", "(0 + x | g)", "(-1 + x | g)", "(x || g)", "(0 + x || g)", "(1 + x + `my w` || g)", "(x * k || g)", "(1 | g/h)", "(1 | g/h/b)", "(x | g/h)",
  "(x || g/h)", "(1 | g:h)", "(1 | h:g)", "(1 | a:b:h)", "(1 | g) + (1 | h)", "(1 | h) + (1 | g)", "(1 | h) + (0 + x | h) + (1 | g)", "(x | h) + (1 | a) + (1 | g)",
  "(1 | b) + (1 | h) + (1 | a) + (1 | g)", "(a | g)", "(0 + a | g)", "(a * b | g)", "(o | g)", "(0 + a:b | g)", "(poly(x, 2) | g)", "(l | g)", "(s | h)",
  "(1 | s)", "(1 | l)", "(1 | k)", "(1 | c:s)", "(1 | g) + (1 | g:h) + (1 | h)", "(1 | i/h)", "(1 | h) + (1 | i) + (x - 1 | g)", "(1 | x)", "(1 | a:i)", "(I(x^2) | g) + (1 | a:b)",
  "a * x + (a | g) + (1 | c)", "x + (b + x | h)", "(1 | total.n)")
ct <- lmerControl(check.nobs.vs.nlev = "ignore", check.nobs.vs.nRE = "ignore", check.nobs.vs.rankZ = "ignore", check.rankX = "ignore", check.scaleX = "ignore")
resm <- lapply(mixed, function(m) {
  lf <- suppressMessages(suppressWarnings(lFormula(as.formula(paste("y ~", m)), d, control = ct)))
  re <- lf$reTrms
  asg <- attr(re$flist, "assign")
  list(formula = paste("y ~", m), terms = lapply(seq_along(re$cnms), function(t) {
    f <- re$flist[[asg[t]]]
    k <- length(re$cnms[[t]])
    zt <- as.matrix(re$Ztlist[[t]])               # (levels * k) x n; one column per row of the data, k entries each
    code <- as.integer(f)
    z <- lapply(seq_len(k), function(j) num(zt[cbind((code - 1) * k + j, seq_len(ncol(zt)))]))
    list(group = names(re$cnms)[t], names = I(re$cnms[[t]]), levels = I(levels(f)), level = code - 1L, z = z)
  }))
})

tf <- c("~ a %in% b", "~ a + b %in% a", "~ (a + c) %in% b", "~ a*b %in% c", "~ b + a + a:b", "~ a:b + b", "~ b - b + a:b", "~ (a + b)/c", "~ a/(b + c)", "~ a/b/c",
  "~ (a + b + c)^2 - a:b", "~ a:a", "~ a^2", "~ I(a)^2 + log(a + 1):b", "~ a*1", "~ (1 + a)^2", "~ (0 + a)*b", "~ a - (1 + b)", "~ a - 0",
  "~ a - 1 + 1", "~ a + (b - 1)", "~ a - (-1)", "~ +a + b", "~ -a + b", "~ a + offset(b) + c:offset(b)", "~ a %% b", "~ a < b", "~ a*(b)", "~ ((a + b)):c",
  "~ a & b", "~ !a + b", "~ (a + b + c + d)^3 - b:c:d", "~ a*b*c - a:b:c - b", "~ a:b:c + a", "~ (a + b):(c + d)", "~ (a*b)^2", "~ a + b:c + c", "~ `x y`:a + a",
  "~ (a + b)^2/c", "~ a - a", "~ 0", "~ -1", "~ 1 - 1", "~ log(x, base = 2)*factor(g)", "~ (a - 1)^2", "~ x == 1", "~ a:(b - c)", "~ (a + b - a):c")
rest <- lapply(tf, function(f) { t <- terms(as.formula(f))
  list(formula = f, labels = I(attr(t, "term.labels")), intercept = attr(t, "intercept") == 1) })
up <- list(c("y ~ a*b + (1 | g) + offset(o)", ". ~ . - a:b + (1 | h) - (1 | g) - 1"), c("y ~ a + (x || g)", "~ . - (x || g)"), c("y ~ x", ". ~ z + ."),
  c("y ~ 0 + a", ". ~ . + b"), c("y ~ a", "~ 1"), c("~ a", "y ~ ."), c("y ~ x + (1 | g)", "log(.) ~ ."), c("y ~ a + b", ". ~ .^2"), c("y ~ a", ". ~ .:b"),
  c("y ~ a + b + (1 | g)", ". ~ . - b"), c("cbind(s, f) ~ p + (1 | h)", ". ~ . + (1 | obs)"), c("y ~ a + (1 | g)", ". ~ . - 1"), c("y ~ a", "sqrt(y) ~ . - a"))
resu <- lapply(up, function(u) {  # spacing only: R writes ~x for a one-sided formula
  list(formula = u[1], change = u[2], result = paste(deparse(update(as.formula(u[1]), as.formula(u[2])), 500), collapse = "")) })
ex <- c("I(age^2)", "x%%2", "x %/% 2", "x %in% c(1,2)", "a<b", "!a", "-x", "-(x+1)", "(-x)^2", "x^-1", "-x^2", "a:b", "f(1:3)", "1e-3", "100000", "1e5", "123456", "1L", "1e15",
  "0.1", ".5", "2.0", "3.14159265358979", "0.00001", "1234567.5", "0.0001", "1e4", "1e300", "x^2^3", "(x^2)^3", "!a&b", "a/b*c", "a-b-c", "a-(b-c)", "poly(x,2,raw=TRUE)",
  "bs(x,knots=c(-1,.5),Boundary.knots=c(-2,2))", "'it'", "f(x,'a b')", "a&&b||c", "a|b", "x**2", "f(`a b`,`c d`=2)", ".x+..y", "NULL", "a*b+c/d-e:f", "I(a*b)", "I(x/2)", "I(-x)", "x>=2")
rese <- lapply(ex, function(e) list(text = e, deparsed = deparse(parse(text = e)[[1]], 500, backtick = TRUE)))

cols <- lapply(names(d), function(v) {
  x <- d[[v]]
  if (is.factor(x)) list(name = v, type = if (is.ordered(x)) "ordered" else "factor", levels = levels(x), values = as.character(x))
  else list(name = v, type = class(x)[1], values = x)
})
newcols <- lapply(names(new), function(v) list(name = v, values = if (is.factor(new[[v]])) as.character(new[[v]]) else new[[v]]))
out <- list(software = paste(R.version.string, "lme4", packageVersion("lme4"), "splines", packageVersion("splines")),
            data = cols, new = newcols, fixed = res, contrasts = resc, mixed = resm,
            terms = rest, update = resu, deparse = rese)
con <- file("model_matrix.json", "w")
# 15 significant digits; one case a line
txt <- function(v) toJSON(v, digits = I(15), auto_unbox = TRUE, null = "null", na = "null")
block <- function(key, items) paste0('"', key, '": [\n', paste(vapply(items, txt, ""), collapse = ",\n"), "\n]")
cat("{\n", paste(c(paste0('"software": ', txt(out$software)), vapply(c("data", "new", "fixed", "contrasts", "mixed", "terms", "update", "deparse"),
    function(k) block(k, out[[k]]), "")), collapse = ",\n"), "\n}\n", sep = "", file = con)
close(con)
