-- Say what became of a probe. ARGV[4..7]: scope, token, "ok", "fail" or "ignore", why
-- Reply: 1, or 0 if the probe's lease was over or the round it belonged to; then a view
local scope, token, outcome, why = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
worker_looks()
local s = load(scope)
if redis.call('ZREM', key(scope, 'p'), token) == 0 or s.state ~= 'half-open' then return {0, view(s)} end
if outcome == 'ok' then
  s.good, s.lost = s.good + 1, 0
  if s.good >= rules.successes then change(s, 'closed', s.good .. ' probes arrived'); s.ok_at = now end
  save(s)
elseif outcome == 'fail' then
  change(s, 'open', why)
  save(s)
end
return {1, view(s)}
