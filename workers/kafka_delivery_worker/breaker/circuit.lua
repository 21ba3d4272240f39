-- What all operations on circuits share; the script of an operation follows it.
--
-- KEYS[1]: base of all keys of one Kafka cluster, "kafka-delivery:cb:1:{cluster}:". Every other key is made from it, hash
--          tag included, so that all lie in one slot
-- ARGV: rules (JSON), worker, a random number from 0 to 1 (Lua's own are the same at each run), then the operation's
--
-- A scope is "cluster" or "topic:<name>". Under <base><scope>: lie
--   st  hash: the circuit      w  hash: its window, ten buckets      f  hash: worker -> when it failed last (ms)
--   p   sorted set: probe token -> when its lease ends (ms)
-- and under <base>: workers, topics (sorted sets by time, ms), log (stream of transitions).
--
-- All times are Redis's own, whose clock may have been another one: with each time that holds something up lies when it
-- was written, and a beginning that has not come yet is now. An open circuit is a state with an end, never a key that
-- expires. While no worker looks for half a minute it holds up no claim (claim.lua).
local base, rules, worker, dice = KEYS[1], cjson.decode(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local CLUSTER = 'cluster'
local LOG = 1000                 -- transitions that are kept
local KEEP = 7 * 86400 * 1000    -- a circuit that nobody touches for so long is forgotten
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)

local NUMBERS = {
  epoch = 0, since = 0, till = 0, trips = 0, good = 0, lost = 0, ok_at = 0, streak = 0, streak_at = 0, ramp_at = 0,
  forced_till = 0, forced_at = 0, silent = 0, probe_at = 0, probe_ms = 0,
}
local TEXTS = {state = 'closed', why = '', by = '', forced = '', forced_by = '', forced_why = '', probe = ''}

-- A full Redis refuses a script whose first write needs memory, and lets all of any other pass. This one needs none: what
-- fills Redis may be the backlog of the very outage that ends here.
redis.call('ZREM', base .. 'workers', '')

local function key(scope, part) return base .. scope .. ':' .. part end

local function shut(s)  -- whether records wait; what a person forces comes before what the circuit found
  if s.forced == 'open' then return true end
  return s.forced == '' and s.state ~= 'closed'
end

local function began(s, at, till)  -- no beginning is to come: what a clock that was ahead began lasts as long from now
  local ahead = s[at] - now
  if ahead <= 0 then return end
  s[at], s.moved = now, true
  if till and s[till] > 0 then s[till] = s[till] - ahead end
end

local function load(scope)
  local s = {scope = scope, changed = 0}
  for name, value in pairs(NUMBERS) do s[name] = value end
  for name, value in pairs(TEXTS) do s[name] = value end
  local stored = redis.call('HGETALL', key(scope, 'st'))
  for i = 1, #stored, 2 do s[stored[i]] = NUMBERS[stored[i]] and tonumber(stored[i + 1]) or stored[i + 1] end
  s.was_shut = s.shut == '1'
  began(s, 'since', 'till')
  began(s, 'forced_at', 'forced_till')
  began(s, 'ok_at')
  began(s, 'streak_at')
  s.till = math.min(s.till, now + rules.max_open_ms * (1 + rules.jitter))
  if s.forced ~= '' and s.forced_till > 0 and s.forced_till <= now then
    s.forced, s.ended = '', s.forced
  end
  return s
end

local function log(s, from, to, why, by)
  redis.call('XADD', base .. 'log', 'MAXLEN', '~', LOG, '*', 'scope', s.scope, 'from', from, 'to', to, 'why', why,
    'by', by, 'trips', s.trips, 'epoch', s.epoch)
  s.changed = 1
end

local function save(s)
  if s.ended then
    log(s, 'forced ' .. s.ended, 'auto', 'the time that it was forced for is over', worker)
    s.ended, s.forced_till = nil, 0
  end
  if s.was_shut and not shut(s) then s.ramp_at = now end  -- claims grow from here
  local fields = {'shut', shut(s) and '1' or '0'}
  for name in pairs(NUMBERS) do fields[#fields + 1] = name; fields[#fields + 1] = s[name] end
  for name in pairs(TEXTS) do fields[#fields + 1] = name; fields[#fields + 1] = s[name] end
  redis.call('HSET', key(s.scope, 'st'), unpack(fields))
  redis.call('PEXPIRE', key(s.scope, 'st'), KEEP)
end

local function change(s, to, why, epoch)
  local from = s.state
  if from == 'closed' and now - s.since > rules.forget_ms then s.trips = 0 end  -- well since long: a new outage
  s.state, s.why, s.by, s.since = to, why, worker, now
  s.epoch = epoch or math.max(s.epoch + 1, now)  -- grows also after Redis has lost what it knew
  s.good, s.lost, s.streak, s.streak_at = 0, 0, 0, 0
  if to == 'closed' then s.silent = 0 end
  if to == 'open' then
    s.trips = s.trips + 1
    local wait = math.min(rules.max_open_ms, rules.open_ms * rules.growth ^ (s.trips - 1))
    s.till = now + math.floor(wait * (1 + rules.jitter * dice))
  end
  redis.call('DEL', key(s.scope, 'w'), key(s.scope, 'f'))
  log(s, from, to, why, worker)
end

local function worker_looks() redis.call('ZADD', base .. 'workers', now, worker) end

local function lose_probes(s, length)  -- leases that ended: who held them is dead. One that is longer than any is none
  local leases = key(s.scope, 'p')
  if s.probe_at > now then
    s.probe_at, s.moved = now, true
    redis.call('ZADD', leases, 'XX', now + s.probe_ms, s.probe)
  end
  redis.call('ZREMRANGEBYSCORE', leases, '(' .. now + math.max(length, s.probe_ms), '+inf')
  s.lost = s.lost + redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
  if s.lost >= rules.max_lost then change(s, 'open', s.lost .. ' probes in a row were lost') end
end

local function view(s)
  local remaining = s.state == 'open' and math.max(0, s.till - now) or 0
  local forced = s.forced_till > 0 and s.forced_till - now or 0
  return {s.scope, s.state, s.epoch, math.ceil(remaining), s.trips, s.forced, forced, s.why, s.changed}
end
