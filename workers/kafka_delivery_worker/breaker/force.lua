-- Override a circuit by hand, for everybody. ARGV[4..8]: scope, "open", "closed" or "" (automatic again), for how long
-- (ms, 0: until it is changed), who, why. The automatic state goes on underneath. Reply: a view
local scope, mode, length, who, why = ARGV[4], ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8]
local s = load(scope)
local before = s.forced == '' and s.state or 'forced ' .. s.forced
s.ended = nil
s.epoch = math.max(s.epoch + 1, now)
s.forced, s.forced_by, s.forced_why, s.forced_till = mode, who, why, length > 0 and now + length or 0
s.forced_at = now
log(s, before, mode == '' and 'auto' or 'forced ' .. mode, why, who)
if scope ~= CLUSTER then redis.call('ZADD', base .. 'topics', now, scope) end
save(s)
return view(s)
